"""Faults of Slurm and signals at the worst time, on a real Slurm: `make test PYTEST_ARGS="-m faults"`.

Too slow for each test run. The tests of preempted jobs write a table to the file in FAULT_TABLE.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.concurrent_tests import concurrent
from tests.helpers.slurm_cluster import Cluster, Partition, brought_up
from tests.helpers.slurm_jobs import Inputs, Run, last_step, same_run, submit_template, wait_until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slurm,
    pytest.mark.timeout(3600),
    pytest.mark.xdist_group("slurm"),
]
DELAYS = [float(delay) for delay in os.environ.get("FAULT_DELAYS", "0 1 2 3 4 5 6 7 8 9 10").split()]
LAUNCHERS = ("submit", "train", "array", "torchrun")


class Job:
    """A run of one task, submitted by launch.submit or one of the templates. The steps of its first start are slow."""

    def __init__(self, cluster: Partition, inputs: Inputs, folder: Path, how: str, *, grace: bool = False) -> None:
        self.cluster, self.node, self._folder = cluster, cluster.nodes[1], folder
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir = folder / "run"
        queue = "grace" if grace else cluster.name
        if how == "submit":
            extra = f"{{nodelist: {self.node}}}"
            self.id = Run(cluster, inputs, self.run_dir, inputs.small, 1, partition=queue, extra=extra).job
            return
        options = ["--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1", f"--nodelist={self.node}"]
        args = [*inputs.small, f"run_dir={self.run_dir}"]
        if how == "array":
            (folder / "trials.txt").write_text(args.pop() + "\n")
            options, args = [*options, "--array=1-1"], ["trials.txt", *args]
        slow = {"PYTHONPATH": str(inputs.slow_steps), "SECONDS_A_STEP": "1", "GPUS": "1"}
        self.id = submit_template(
            cluster, f"{how}.sbatch", [*options, f"--partition={queue}"], args, folder, **slow
        ) + ("_1" if how == "array" else "")

    def output(self) -> str:
        paths = [*self._folder.rglob("*_log.out"), *self._folder.glob("slurm-*.out")]
        return "\n".join(path.read_text() for path in paths)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: last_step(self.run_dir) >= step, self.output)

    def wait_until_same_as(self, reference: Path) -> None:
        state = self.cluster.wait_for(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=600)
        assert state == "COMPLETED", self.output()
        same_run(self.run_dir, reference)


def preempted(how: str, grace: bool) -> Callable[[Partition, Inputs, Path], None]:
    """A test: preempt a job so many seconds after it has started; it completes by itself, same as undisturbed."""

    def body(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
        for delay in DELAYS:
            job = Job(partition, inputs, tmp_path / str(delay), how, grace=grace)
            partition.wait_for(job.id, "RUNNING")
            time.sleep(delay)
            urgent = partition.sbatch(
                "sleep 1", "--partition=urgent", f"--nodelist={job.node}", "--exclusive", "--time=1"
            )
            partition.wait_for(urgent, "COMPLETED")
            job.wait_until_same_as(inputs.reference(1, inputs.small))
            row = [how, "grace" if grace else "no grace", f"{delay:g} s", " ".join(partition.history(job.id))]
            if "FAULT_TABLE" in os.environ:
                with Path(os.environ["FAULT_TABLE"]).open("a") as file:
                    file.write(f"| {' | '.join(row)} |\n")

    body.__name__ = f"test_{how}_preempted_{'with' if grace else 'without'}_grace"
    return body


for _how in LAUNCHERS:
    for _grace in (False, True):
        _body = preempted(_how, _grace)
        globals()[_body.__name__] = concurrent()(_body)


def signalled(how: str, number: str) -> Callable[[Partition, Inputs, Path], None]:
    """A test: a signal to the batch script alone."""

    def body(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
        job = Job(partition, inputs, tmp_path, how)
        job.wait_for_step(3)
        partition.run("scancel", "--batch", f"--signal={number}", job.id)
        job.wait_until_same_as(inputs.reference(1, inputs.small))
        assert len(partition.history(job.id)) == 2

    body.__name__ = f"test_{number}_to_the_batch_script_of_{how}"
    return body


for _how in LAUNCHERS:
    for _number in ("TERM", "USR2"):
        _body = signalled(_how, _number)
        globals()[_body.__name__] = concurrent()(_body)


@concurrent()
def test_a_suspended_run_continues(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    args = [*inputs.small, "distributed.timeout_seconds=600"]  # torch counts the time in which it is stopped
    run = Run(partition, inputs, tmp_path / "run", args, 1, gpus_per_node=2)
    run.wait_for_step(3)
    partition.run("scontrol", "suspend", run.job)
    time.sleep(75)  # longer than a rank may be silent
    partition.run("scontrol", "resume", run.job)
    run.wait_until_same_as(inputs.reference(2, args))
    assert partition.history(run.job)[-1] == "COMPLETED"
    assert json.loads((run.run_dir / "attempt.json").read_text())["restarts"] == 0


@concurrent()
def test_a_node_that_is_cut_off_while_it_saves(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    node = partition.nodes[1]
    with partition.only_on(node):
        run = Run(partition, inputs, tmp_path / "run", [*inputs.small, "checkpoint.every_steps=1"], 1, save=5)
        run.wait_for_step(3)
    saving = run.run_dir / "checkpoints"
    earlier = {path.name for path in saving.glob(".step-*.partial")}
    wait_until(lambda: {path.name for path in saving.glob(".step-*.partial")} - earlier, run.output)
    partition.cut(node)  # within the seconds that the new save takes
    partition.wait_for(run.job, "PENDING", "COMPLETED")
    run.wait_until_same_as(inputs.reference(1, [*inputs.small, "checkpoint.every_steps=1"]))


# A daemon is stopped. These have clusters of their own.


@pytest.fixture
def own(tmp_path: Path, folder: Path) -> Iterator[tuple[Partition, Inputs]]:
    with brought_up("--nodes", 2, "--name", "faulty") as cluster:
        inputs = Inputs(folder, tmp_path / "inputs", None)
        inputs.folder.mkdir()
        # A partition of slurm.conf: a new controller does not know those that were created by command.
        yield Partition(cluster.dir, cluster.environment, "batch", ("n1", "n2")), inputs


@pytest.mark.parametrize("daemon", ["controller", "munge", "accounting"])
def test_a_daemon_is_stopped_when_a_run_requeues_itself(
    own: tuple[Partition, Inputs], tmp_path: Path, daemon: str
) -> None:
    """The signal is sent without Slurm's help, as it would be before the time limit."""
    partition, inputs = own
    run = Run(partition, inputs, tmp_path / "run", inputs.small, 1)
    run.wait_for_step(3)
    partition.tool("stop", daemon)
    for pid in run.processes():
        os.kill(pid, signal.SIGUSR2)
    if daemon != "accounting":
        wait_until(lambda: "trying again" in run.output(), run.output)
        partition.tool("start", daemon)
    else:
        wait_until(lambda: "is requeued" in run.output(), run.output)
        partition.tool("start", daemon)
    run.wait_until_same_as(inputs.reference(1, inputs.small))
    wait_until(lambda: partition.history(run.job)[-1] == "COMPLETED")


def test_the_controller_is_away_while_a_run_completes(own: tuple[Partition, Inputs], tmp_path: Path) -> None:
    partition, inputs = own
    run = Run(partition, inputs, tmp_path / "run", inputs.small, 1)
    run.wait_for_step(3)
    partition.tool("stop", "controller")
    wait_until(lambda: (run.run_dir / "report.html").exists(), run.output)
    partition.tool("start", "controller")
    run.wait_until_same_as(inputs.reference(1, inputs.small))


def test_a_stopped_daemon_is_named_by_status(own: tuple[Cluster, Inputs]) -> None:
    cluster, _ = own
    for what, name in (("controller", "slurmctld"), ("accounting", "slurmdbd"), ("munge", "munged")):
        cluster.tool("stop", what)
        assert f"no {name}" in cluster.tool("status")
        cluster.tool("start", what)
