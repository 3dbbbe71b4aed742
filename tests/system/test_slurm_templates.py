"""The batch scripts in slurm/, without submitit, on a real Slurm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.concurrent_tests import concurrent
from tests.helpers.paths import ROOT
from tests.helpers.slurm_cluster import Partition
from tests.helpers.slurm_jobs import Inputs, last_step, one_run_of_wandb, same_run, submit_template, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.xdist_group("slurm")]


def check_signal_and_resume(
    partition: Partition, inputs: Inputs, tmp_path: Path, name: str, *signal_options: str
) -> None:
    """Two nodes with one process each. After a signal the run saves, and the job is requeued."""
    options, run_dir = ["--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1"], tmp_path / "run"
    args, path = [*inputs.job_args, f"run_dir={run_dir}"], f"{inputs.slow_steps}:{ROOT}"
    job = submit_template(partition, name, options, args, tmp_path, PYTHONPATH=path, SECONDS_A_STEP="1.5", GPUS="1")
    wait_until(lambda: last_step(run_dir) >= 7, lambda: [path.read_text() for path in tmp_path.glob("*.out")])
    partition.run("scancel", *signal_options, job)
    partition.wait_for(job, "COMPLETED")
    assert len(partition.history(job)) == 2
    same_run(run_dir, inputs.reference())
    one_run_of_wandb(inputs, run_dir)


@concurrent()
def test_train_sbatch(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    check_signal_and_resume(partition, inputs, tmp_path, "train.sbatch", "--batch", "--signal=TERM")


@concurrent(first=True)
def test_torchrun_sbatch(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    check_signal_and_resume(partition, inputs, tmp_path, "torchrun.sbatch", "--signal=USR2")


@concurrent()
def test_array_sbatch(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "trials.txt").write_text("stages.head.lr=0.02\nstages.head.lr=0.03 seed=1\n")
    args = ["trials.txt", *inputs.small, "stages.full.epochs=1"]
    job = submit_template(partition, "array.sbatch", ["--array=1-2", "--gpus-per-node=1"], args, tmp_path)
    for task, seed in ((1, "0"), (2, "1")):
        partition.wait_for(f"{job}_{task}", "COMPLETED")
        run_dir = tmp_path / "runs" / f"array-{job}" / str(task)
        assert json.loads((run_dir / "summary.json").read_text())["status"] == "completed"
        assert re.search(rf"^seed: {seed}$", (run_dir / "config.yaml").read_text(), re.MULTILINE)
