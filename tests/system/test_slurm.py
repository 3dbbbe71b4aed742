"""Submitted for real: runs and sweeps on a Slurm of two nodes, through all that befalls a job there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build
from distil_tl.rundir.lock import MAX_STUCK, read_attempt
from launch.records import read_record
from tests.helpers.arguments import small_args
from tests.helpers.paths import ROOT
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.same_run import differing, timeless
from tests.helpers.slurm_cluster import Cluster
from tests.helpers.wandb_server import Server, serving

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
# A task sleeps in each step, so that there is time for things to happen; what it computes is the same.
SLOWLY = """
import os, sys, time
if "SECONDS_A_STEP" in os.environ and any("submitit" in word or "launch.task" in word for word in sys.orig_argv):
    import torch.optim
    step = torch.optim.SGD.step
    def slow_step(self, *args, **kwargs):
        time.sleep(float(os.environ["SECONDS_A_STEP"]))
        return step(self, *args, **kwargs)
    torch.optim.SGD.step = slow_step
"""


@dataclass(frozen=True)
class Tracked(Cluster):
    """With a server for Weights & Biases, where nodes can reach it."""

    server: Server


@pytest.fixture(scope="module")
def server(slurm_cluster: Cluster) -> Iterator[Server]:
    with serving(slurm_cluster.address(socket.gethostname()), tells=True) as found:
        yield found


@pytest.fixture
def cluster(slurm_cluster: Cluster, server: Server) -> Iterator[Tracked]:
    known = {field.name: getattr(slurm_cluster, field.name) for field in fields(slurm_cluster)}
    known["environment"] = {**slurm_cluster.environment, **server.environment}
    yield Tracked(**known, server=server)
    slurm_cluster.restore()


@pytest.fixture(scope="module")
def job_args(folder: Path) -> list[str]:
    """12 epochs of 6 steps after one of the head, and a checkpoint every 5 steps; followed by Weights & Biases."""
    return [*small_args(folder), "stages.full.epochs=12", "checkpoint.every_steps=5", "tracking.wandb.mode=online"]


@pytest.fixture(scope="module")
def reference(job_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out on two ranks when nothing happens."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert run_ranks(2, train, [*job_args, f"run_dir={run_dir}", "tracking.wandb.mode=disabled"]) == [0, 0]
    return run_dir


@pytest.fixture(scope="module")
def slowly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slowly")
    (folder / "sitecustomize.py").write_text(SLOWLY)
    return folder


def launched(cluster: Cluster, module: str, *args: object, status: int = 0) -> str:
    """What `python -m launch.MODULE` says."""
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *map(str, args)],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


class Run:
    """One that was submitted, of two tasks on one node unless told otherwise."""

    def __init__(self, cluster: Cluster, run_dir: Path, slowly: Path, args: list[str], seconds: float, **slurm: object):
        wanted = {"nodes": 1, "gpus_per_node": 2, "cpus_per_task": 1, "time": 10, "signal_delay_s": 20, **slurm}
        setup = f"slurm.setup=[export PYTHONPATH={slowly}, export SECONDS_A_STEP={seconds}]"
        options = [f"slurm.{key}={value}" for key, value in wanted.items()]
        self.cluster, self.run_dir = cluster, run_dir
        launched(cluster, "submit", *args, f"run_dir={run_dir}", *options, setup)
        self.job = json.loads((run_dir / "submitted.json").read_text())["job_id"]

    def wait_for_step(self, step: int, timeout: float = 90) -> None:
        deadline = time.monotonic() + timeout
        while not (path := self.run_dir / "metrics.jsonl").exists() or all(
            line["step"] < step for line in lines(self.run_dir)
        ):
            assert time.monotonic() < deadline, f"{path} has no step {step}; {self.said()}"
            time.sleep(0.2)

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run_dir / "slurm").glob("*_log.out")))

    def finished(self, reference: Path, timeout: float = 120) -> None:
        """Wait for its end, and compare it with a run to which nothing happened."""
        self.cluster.wait_for(self.job, "COMPLETED", timeout=timeout)
        same_run(self.run_dir, reference)
        if isinstance(self.cluster, Tracked) and (self.run_dir / "wandb-id").exists():
            one_run_of_wandb(self.cluster.server, self.run_dir)


@contextlib.contextmanager
def only_on(cluster: Tracked, node: str) -> Iterator[None]:
    """Jobs begin on that node alone, and may go on anywhere."""
    others = [name for name in cluster.node_states() if name != node]
    cluster.run("scontrol", "update", f"nodename={','.join(others)}", "state=drain", "reason=test")
    yield
    cluster.run("scontrol", "update", f"nodename={','.join(others)}", "state=resume")


def same_run(run_dir: Path, reference: Path) -> None:
    """Bit-equal weights, optimizer state and metrics, and steps that never go back."""
    assert timeless(lines(run_dir)) == timeless(lines(reference))
    steps = [line["step"] for line in lines(run_dir)]
    assert steps == sorted(steps)
    last, expected = (path / "checkpoints" / "last" for path in (run_dir, reference))
    assert last.readlink() == expected.readlink()
    weights = [load_file(path / "weights.safetensors") for path in (last, expected)]
    states = [torch.load(path / "train_state.pt", weights_only=True) for path in (last, expected)]
    assert differing("weights", *weights) + differing("state", *states) == []


def one_run_of_wandb(server: Server, run_dir: Path) -> None:
    """The server has each step once, in order, in a single run that has ended."""
    steps = [line["step"] for line in lines(run_dir, window="interval")]
    deadline = time.monotonic() + 90  # summary.json, by which a run is known as completed, comes before W&B's end
    while server.run(run_dir)["state"] != "finished" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert server.steps(run_dir) == steps == list(range(1, len(steps) + 1))
    assert server.run(run_dir)["state"] == "finished"


def test_two_nodes_give_the_metrics_of_torchrun_on_one(
    cluster: Tracked, small: list[str], tmp_path: Path, slowly: Path
) -> None:
    run = Run(cluster, tmp_path / "slurm", slowly, small, 0, nodes=2)
    alone = tmp_path / "torchrun"
    command = ["torchrun", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(
        [*command, "-m", "distil_tl.train", *small, f"run_dir={alone}"],
        cwd=ROOT, env=environ, capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    run.finished(alone)
    summary, env = (json.loads((run.run_dir / name).read_text()) for name in ("summary.json", "env.json"))
    assert (summary["status"], summary["world_size"], env["launcher"]) == ("completed", 4, "slurm")
    assert env["git"] == json.loads((alone / "env.json").read_text())["git"], "of the snapshot that ran"
    assert (run.run_dir / "slurm").stat().st_mode & 0o777 == 0o700
    assert list((run.run_dir / "slurm").glob("*_submission.sh"))
    assert "completed" in launched(cluster, "status", run.run_dir)


def test_the_script_of_a_dry_run_is_one_that_sbatch_takes(cluster: Tracked, small: list[str], tmp_path: Path) -> None:
    options = ["slurm.nodes=2", "slurm.gpus_per_node=2", "slurm.cpus_per_task=1", "slurm.time=1:00:00", "slurm.mem=1GB"]
    options += ["slurm.partition=batch", "slurm.extra.comment=mine", "slurm.exclude=null"]
    said = launched(cluster, "submit", *small, f"run_dir={tmp_path}/run", *options, "--dry-run")
    (tmp_path / "script").write_text(said[said.index("#!") :])
    cluster.run("sbatch", "--test-only", tmp_path / "script")
    assert not (tmp_path / "run").exists()


def test_a_preempted_run_goes_on(cluster: Tracked, reference: Path, job_args, slowly: Path, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "run", slowly, job_args, 0.12, extra="{nodelist: n2}")
    run.wait_for_step(20)
    urgent = cluster.sbatch("sleep 2", "--partition=urgent", "--nodelist=n2", "--exclusive", "--time=1")
    cluster.wait_for(urgent, "COMPLETED")
    run.finished(reference)
    assert cluster.history(run.job) == ["PREEMPTED", "COMPLETED"]
    assert "so it is not requeued" in run.said(), "who requeues one that Slurm requeues would do it twice"


def test_a_run_that_is_preempted_with_grace_requeues_itself(
    cluster: Tracked, reference: Path, job_args, slowly: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path / "run", slowly, job_args, 0.12, partition="grace", extra="{nodelist: n2}")
    run.wait_for_step(20)
    urgent = cluster.sbatch("sleep 2", "--partition=urgent", "--nodelist=n2", "--exclusive", "--time=1")
    cluster.wait_for(urgent, "COMPLETED")
    run.finished(reference)
    assert len(cluster.history(run.job)) == 2


def test_requeued_by_hand_and_cancelled(
    cluster: Tracked, reference: Path, job_args, slowly: Path, tmp_path: Path
) -> None:
    by_hand = Run(cluster, tmp_path / "by hand", slowly, job_args, 0.12)
    cancelled = Run(cluster, tmp_path / "cancelled", slowly, job_args, 0.12)
    by_hand.wait_for_step(20)
    cluster.run("scontrol", "requeue", by_hand.job)
    cancelled.wait_for_step(20)
    cluster.scancel(cancelled.job)
    by_hand.finished(reference)
    assert cluster.state(cancelled.job) == "CANCELLED"
    assert cluster.history(cancelled.job) == ["CANCELLED"], "and not brought back"
    status = json.loads(launched(cluster, "status", tmp_path, "--json"))
    assert {Path(run["run_dir"]).name: run["state"] for run in status["runs"]} == {
        "by hand": "completed",
        "cancelled": "stopped",
    }
    said = launched(cluster, "submit", *job_args, f"run_dir={by_hand.run_dir}", "slurm.cpus_per_task=1", "--dry-run")
    assert "#SBATCH" in said, "a job that is over is in nobody's way"


def test_a_node_is_cut_off_and_the_time_of_a_job_on_the_other_is_up(
    cluster: Tracked, reference: Path, job_args, slowly: Path, tmp_path: Path
) -> None:
    """Ranks on the node live on, and find each other there; the run goes on elsewhere, and only that one may write."""
    with only_on(cluster, "n1"):
        limited = Run(cluster, tmp_path / "limited", slowly, job_args, 1.2, time=2, signal_delay_s=30)
        cluster.wait_for(limited.job, "RUNNING")
    with only_on(cluster, "n2"):
        run = Run(cluster, tmp_path / "run", slowly, job_args, 1.2)
        run.wait_for_step(6)
    cluster.cut("n2")
    cluster.wait_for(run.job, "PENDING", timeout=90)
    cluster.wait_for(run.job, "RUNNING", timeout=60)
    run.finished(reference, timeout=200)
    assert "NODE_FAIL" in cluster.history(run.job)
    assert "another process took over" in run.said()

    limited.finished(reference, timeout=200)
    assert set(cluster.history(limited.job)[:-1]) == {"REQUEUED"}
    assert f"job {limited.job} is requeued" in limited.said()


def test_a_node_whose_daemon_dies(cluster: Tracked, reference: Path, job_args, slowly: Path, tmp_path: Path) -> None:
    with only_on(cluster, "n2"):
        run = Run(cluster, tmp_path / "run", slowly, job_args, 0.5)
        run.wait_for_step(6)
    cluster.tool("kill-slurmd", "n2")
    cluster.wait_for(run.job, "PENDING", "COMPLETING", timeout=90)
    run.finished(reference, timeout=200)


def test_a_run_that_gets_nowhere_is_given_up(cluster: Tracked, job_args, slowly: Path, tmp_path: Path) -> None:
    run = Run(cluster, tmp_path / "run", slowly, [*job_args, "checkpoint.every_steps=1000"], 30)
    path = run.run_dir / "attempt.json"
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.2)
    # As if it had been restarted so often already.
    path.write_text(json.dumps({**json.loads(path.read_text()), "stuck": MAX_STUCK}))
    cluster.run("scontrol", "requeue", run.job)
    cluster.wait_for(run.job, "FAILED")
    assert f"restarted {MAX_STUCK + 1} times at step 0 without progress" in run.said()


@pytest.fixture
def trials(folder: Path, tmp_path: Path) -> Path:
    """A sweep of 12, two of which have weights that can't be read."""
    common = dict(arg.split("=", 1) for arg in small_args(folder))
    del common["model.weights"]
    text = ["name: twelve", "set:", *(f"  {key}: {value}" for key, value in common.items()), "trials:"]
    for i in range(6):
        text.append(
            f"  - {{stages.head.lr: {i + 1}e-3, model.weights: {tmp_path / 'broken.pt' if i == 4 else 'none'}}}"
        )
    text += ["seeds: [0, 1]", "slurm: {gpus_per_node: 1, cpus_per_task: 1, time: 10, array_parallelism: 3}"]
    (tmp_path / "sweep.yaml").write_text("\n".join(text))
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    return tmp_path / "sweep.yaml"


def wait_for_all(cluster: Tracked, folder: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 200
    while True:
        found: dict[str, Any] = json.loads(launched(cluster, "status", folder, "--json"))
        if {run["state"] for run in found["runs"]} <= {"completed", "failed"}:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(1)


def test_a_sweep_with_two_failures(cluster: Tracked, trials: Path, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    said = launched(cluster, "sweep", trials, "--dir", folder)
    assert "12 trials" in said
    found = wait_for_all(cluster, folder)
    assert len(found["runs"]) == 12
    failed = [run for run in found["runs"] if run["state"] == "failed"]
    assert [run["values"]["stages.head.lr"] for run in failed] == [5e-3] * 2
    done = [run["best"]["top1"] for run in found["runs"] if run["state"] == "completed"]
    assert len(done) == 10
    assert done == sorted(done, reverse=True)
    assert found["runs"][-2:] == failed, "they rank last"

    said = launched(cluster, "sweep", trials, "--dir", folder)
    assert "not submitted: 10 completed, 2 failed" in said
    assert "nothing to submit" in said
    model = build(ModelConfig("shufflenet_v2_x0_5", weights="none"), 1000, image_size=None, seed=0)
    torch.save(model.module.state_dict(), tmp_path / "broken.pt")
    said = launched(cluster, "sweep", trials, "--dir", folder, "--resubmit-failed")
    assert "2 trials" in said
    jobs = {read_record(Path(run["run_dir"]))["job_id"].partition("_")[0] for run in found["runs"][:10]}  # type: ignore[index]
    assert len(jobs) == 1, "the others were not submitted again"
    found = wait_for_all(cluster, folder)
    assert [run["state"] for run in found["runs"]] == ["completed"] * 12
    assert "nothing to submit" in launched(cluster, "sweep", trials, "--dir", folder, "--resubmit-failed")


def test_one_task_of_an_array_is_requeued_alone(cluster: Tracked, reference: Path, job_args, slowly, tmp_path) -> None:
    values = [arg for arg in job_args if not arg.startswith("seed=")]
    (tmp_path / "sweep.yaml").write_text(
        "name: pair\nseeds: [0, 1]\nslurm:\n  {gpus_per_node: 2, cpus_per_task: 1, time: 10,"
        f" setup: ['export PYTHONPATH={slowly}', export SECONDS_A_STEP=0.15]}}\n"
    )
    folder = tmp_path / "sweep"
    launched(cluster, "sweep", tmp_path / "sweep.yaml", *values, "--dir", folder)
    found = {run["values"]["seed"]: run for run in json.loads(launched(cluster, "status", folder, "--json"))["runs"]}
    first, second = Path(found[0]["run_dir"]), Path(found[1]["run_dir"])
    deadline = time.monotonic() + 90
    while not all((path / "attempt.json").exists() for path in (first, second)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # The last one: its own number, by which it might ask to be requeued, is that of the whole array.
    cluster.run("scancel", "--signal=USR2", read_record(second)["job_id"])  # type: ignore[index]
    wait_for_all(cluster, folder)
    restarts = [read_attempt(path / "attempt.json")["restarts"] for path in (first, second)]  # type: ignore[index]
    assert restarts == [0, 1]
    same_run(first, reference)
    one_run_of_wandb(cluster.server, second)


# Without submitit.


def template(cluster: Tracked, name: str, options: list[str], args: list[str], cwd: Path, **environ: str) -> str:
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), **environ}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["sbatch", "--parsable", "--cpus-per-task=1", "--time=10", *options, str(ROOT / "slurm" / name), *args],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["train.sbatch", "torchrun.sbatch"])
def test_the_templates_for_one_run(
    cluster: Tracked, reference: Path, job_args, slowly: Path, tmp_path: Path, name: str
) -> None:
    """Two nodes of one process each. Warned by USR2 to everything in the job, it saves and comes back."""
    options = ["--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1"]
    args = [*job_args, f"run_dir={tmp_path}/run"]
    path = f"{slowly}:{ROOT}"
    job = template(cluster, name, options, args, tmp_path, PYTHONPATH=path, SECONDS_A_STEP="0.15", GPUS="1")
    deadline = time.monotonic() + 90
    while not (path_ := tmp_path / "run" / "metrics.jsonl").exists() or len(lines(tmp_path / "run")) < 15:
        assert time.monotonic() < deadline, path_
        time.sleep(0.2)
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_for(job, "COMPLETED", timeout=120)
    assert len(cluster.history(job)) == 2
    same_run(tmp_path / "run", reference)
    one_run_of_wandb(cluster.server, tmp_path / "run")


def test_the_template_for_arrays(cluster: Tracked, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "trials.txt").write_text("stages.head.lr=0.02\nstages.head.lr=0.03 seed=1\n")
    options = ["--array=1-2", "--gpus-per-node=1"]
    job = template(cluster, "array.sbatch", options, ["trials.txt", *small], tmp_path)
    for task in (1, 2):
        cluster.wait_for(f"{job}_{task}", "COMPLETED", timeout=90)
    for task, seed in ((1, "0"), (2, "1")):
        run_dir = tmp_path / "runs" / f"array-{job}" / str(task)
        assert json.loads((run_dir / "summary.json").read_text())["status"] == "completed"
        assert re.search(rf"^seed: {seed}$", (run_dir / "config.yaml").read_text(), re.MULTILINE)
