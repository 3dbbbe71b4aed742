"""Jobs on a real Slurm that are preempted, requeued, cancelled, out of time, or lose their node.

Where only Slurm matters they have one task. Where the ranks must also agree on when to stop, they have two. W&B follows
those that are preempted, killed, or lose their node.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path

import pytest

from distil_tl.rundir.lock import MAX_STUCK
from tests.helpers.concurrent_tests import concurrent
from tests.helpers.slurm_cluster import Partition
from tests.helpers.slurm_jobs import Inputs, Run, launched, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.xdist_group("slurm")]


def preempt(partition: Partition, node: str) -> None:
    """Run a short job that takes the whole node."""
    job = partition.sbatch("sleep 2", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--time=1")
    partition.wait_for(job, "COMPLETED")


@concurrent()
def test_a_preempted_run_resumes(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    node = partition.nodes[1]
    run = Run(partition, inputs, tmp_path / "run", inputs.job_args, 1.5, gpus_per_node=2, extra=f"{{nodelist: {node}}}")
    run.wait_for_step(7)
    preempt(partition, node)
    run.wait_until_same_as(inputs.reference())
    assert partition.history(run.job) == ["PREEMPTED", "COMPLETED"]
    assert "so it is not requeued" in run.output(), "Slurm requeues it; to requeue it once more would start it twice"


@concurrent()
def test_a_run_that_is_preempted_with_grace_requeues_itself(
    partition: Partition, inputs: Inputs, tmp_path: Path
) -> None:
    node = partition.nodes[1]
    extra = f"{{nodelist: {node}}}"
    run = Run(partition, inputs, tmp_path / "run", inputs.untracked_args, 1.5, partition="grace", extra=extra)
    run.wait_for_step(7)
    preempt(partition, node)
    run.wait_until_same_as(inputs.reference(1))
    assert len(partition.history(run.job)) == 2


@concurrent()
def test_a_run_that_is_requeued_by_hand_resumes_and_a_cancelled_one_does_not(
    partition: Partition, inputs: Inputs, tmp_path: Path
) -> None:
    by_hand = Run(partition, inputs, tmp_path / "by hand", inputs.untracked_args, 1.5)
    cancelled = Run(partition, inputs, tmp_path / "cancelled", inputs.untracked_args, 1.5)
    by_hand.wait_for_step(7)
    partition.run("scontrol", "requeue", by_hand.job)
    cancelled.wait_for_step(7)
    partition.scancel(cancelled.job)
    by_hand.wait_until_same_as(inputs.reference(1))
    partition.wait_for(cancelled.job, "CANCELLED")
    assert partition.history(cancelled.job) == ["CANCELLED"]
    status = json.loads(launched(partition, "status", tmp_path, "--json"))
    assert {Path(run["run_dir"]).name: run["state"] for run in status["runs"]} == {
        "by hand": "completed",
        "cancelled": "stopped",
    }
    again = [*inputs.untracked_args, f"run_dir={by_hand.run_dir}", "slurm.cpus_per_task=1"]
    assert "#SBATCH" in launched(partition, "submit", *again, "--dry-run"), "a completed job is not in the way"


@concurrent(first=True)
def test_a_run_whose_time_is_up_requeues_itself(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    """Slurm sends the signal 15 to 45 s after its time limit was lowered, as it compares times only every 30 s."""
    run = Run(partition, inputs, tmp_path / "run", inputs.untracked_args, 3, signal_delay_s=45)
    run.wait_for_step(3)
    end = datetime.datetime.now() + datetime.timedelta(seconds=90)
    partition.run("scontrol", "update", f"jobid={run.job}", f"endtime={end:%Y-%m-%dT%H:%M:%S}")
    partition.wait_for(run.job, "PENDING")
    partition.run("scontrol", "update", f"jobid={run.job}", "timelimit=10")
    run.wait_until_same_as(inputs.reference(1))
    assert partition.history(run.job) == ["REQUEUED", "COMPLETED"]
    assert f"job {run.job} is requeued" in run.output()


@concurrent(first=True)
def test_a_run_whose_node_is_cut_off_resumes_elsewhere(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    """The ranks on the cut node keep running and still reach each other. Only the new ones may write.

    Steps are so slow that the old ranks cannot finish before the new ones have started.
    """
    node = partition.nodes[1]
    with partition.only_on(node):
        run = Run(partition, inputs, tmp_path / "run", inputs.job_args, 6, gpus_per_node=2)
        run.wait_for_step(3)
    partition.cut(node)
    partition.wait_for(run.job, "PENDING")
    partition.wait_for(run.job, "RUNNING")
    run.wait_until_same_as(inputs.reference())
    assert "NODE_FAIL" in partition.history(run.job)
    wait_until(lambda: "another process took over" in run.output(), run.output)


@concurrent(first=True)
def test_a_run_whose_node_loses_its_daemon_resumes(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    node = partition.nodes[1]
    with partition.only_on(node):
        run = Run(partition, inputs, tmp_path / "run", inputs.job_args, 6)
        run.wait_for_step(3)
    partition.tool("kill-slurmd", node)
    partition.wait_for(run.job, "PENDING", "COMPLETING")
    run.wait_until_same_as(inputs.reference(1))


@concurrent()
def test_a_run_of_which_a_rank_is_killed_is_requeued(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    """Once: `tests/launch/test_job_script.py` has the other cases."""
    run = Run(partition, inputs, tmp_path / "run", inputs.job_args, 1.5, gpus_per_node=2)
    run.wait_for_step(7)
    os.kill(run.processes(rank=1)[0], signal.SIGKILL)  # as the kernel does when memory runs out
    run.wait_until_same_as(inputs.reference())
    assert partition.history(run.job)[0] == "REQUEUED"
    assert "a process of the run was killed" in run.output()
    assert not list((run.run_dir / "slurm").glob("*.outcome"))


@concurrent()
def test_a_run_that_makes_no_progress_is_ended(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    run = Run(partition, inputs, tmp_path / "run", [*inputs.untracked_args, "checkpoint.every_steps=1000"], 100)
    path = run.run_dir / "attempt.json"
    wait_until(path.exists, run.output)
    # As if Slurm had restarted it so often already.
    path.write_text(json.dumps({**json.loads(path.read_text()), "stuck": MAX_STUCK}))
    partition.run("scontrol", "requeue", run.job)
    partition.wait_for(run.job, "FAILED")
    assert f"restarted {MAX_STUCK + 1} times at step 0 without progress" in run.output()
