"""Runs and sweeps that are submitted to a real Slurm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build
from distil_tl.rundir.lock import read_attempt
from launch.records import read_record
from tests.helpers.concurrent_tests import concurrent
from tests.helpers.slurm_cluster import Partition
from tests.helpers.slurm_jobs import (
    Inputs,
    Run,
    all_ended,
    launched,
    launched_by_command,
    one_run_of_wandb,
    same_run,
    wait_until,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.xdist_group("slurm")]


@concurrent()
def test_four_ranks_on_two_nodes_give_the_metrics_of_four_ranks_on_one_machine(
    partition: Partition, inputs: Inputs, tmp_path: Path
) -> None:
    run = Run(partition, inputs, tmp_path / "slurm", inputs.small, launch=launched_by_command, nodes=2, gpus_per_node=2)
    alone = inputs.reference(4, inputs.small)
    run.wait_until_same_as(alone)
    summary, env = (json.loads((run.run_dir / name).read_text()) for name in ("summary.json", "env.json"))
    assert (summary["status"], summary["world_size"], env["launcher"]) == ("completed", 4, "slurm")
    assert env["git"] == json.loads((alone / "env.json").read_text())["git"], "the commit of the code's snapshot"
    assert (run.run_dir / "slurm").stat().st_mode & 0o777 == 0o700
    assert list((run.run_dir / "slurm").glob("*_submission.sh"))
    assert "completed" in launched_by_command(partition, "status", run.run_dir)


@concurrent()
def test_sbatch_accepts_the_script_of_a_dry_run(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    options = ["slurm.nodes=2", "slurm.gpus_per_node=2", "slurm.cpus_per_task=1", "slurm.time=1:00:00", "slurm.mem=1GB"]
    options += ["slurm.partition=batch", "slurm.comment=mine", "slurm.exclude=null"]
    output = launched(partition, "submit", *inputs.small, f"run_dir={tmp_path}/run", *options, "--dry-run")
    (tmp_path / "script").write_text(output[output.index("#!") :])
    partition.run("sbatch", "--test-only", tmp_path / "script")
    assert not (tmp_path / "run").exists()


@concurrent()
def test_jobs_that_can_never_run_are_refused_and_one_that_waits_is_cancelled(
    partition: Partition, inputs: Inputs, tmp_path: Path
) -> None:
    """A fake Slurm can't know what the real one answers."""
    run_dir = tmp_path / "run"
    args = [*inputs.small, f"run_dir={run_dir}", f"slurm.partition={partition.name}", "slurm.cpus_per_task=1"]
    for impossible, reason in (
        ("slurm.gpus_per_node=8", "Requested node configuration is not available"),
        ("slurm.gpus_per_node=a100:1", "Requested node configuration is not available"),
        ("slurm.partition=nowhere", "Invalid partition name specified"),
    ):
        assert f"{reason} (sbatch --test-only)" in launched(partition, "submit", *args, impossible, status=2)
    assert not run_dir.exists()
    launched(partition, "submit", *args, "slurm.extra.begin=now+1hour")
    assert "(BeginTime)" in launched(partition, "status", run_dir)
    assert "cancelled 1 job: " in launched(partition, "cancel", run_dir, "--pending")
    assert partition.run("squeue", "--noheader", f"--partition={partition.name}") == ""


def write_sweep(partition: Partition, inputs: Inputs, tmp_path: Path) -> Path:
    """A sweep of three trials, one of which has weights that cannot be read."""
    common = dict(arg.split("=", 1) for arg in [*inputs.small, "stages.full.epochs=1"])
    del common["model.weights"]
    text = ["name: three", "set:", *(f"  {key}: {value}" for key, value in common.items()), "trials:"]
    for i in range(3):
        weights = tmp_path / "broken.pt" if i == 1 else "none"
        text.append(f"  - {{stages.head.lr: {i + 1}e-3, model.weights: {weights}}}")
    slurm = f"partition: {partition.name}, gpus_per_node: 1, cpus_per_task: 1, time: 10, array_parallelism: 3"
    text += [f"slurm: {{{slurm}}}"]
    (tmp_path / "sweep.yaml").write_text("\n".join(text))
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    return tmp_path / "sweep.yaml"


@concurrent(first=True)
def test_a_sweep_with_a_failure(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    sweep, folder = write_sweep(partition, inputs, tmp_path), tmp_path / "sweep"
    output = launched_by_command(partition, "sweep", sweep, "--dir", folder)
    assert "3 trials" in output
    status = all_ended(partition, folder)
    assert len(status["runs"]) == 3
    failed = [run for run in status["runs"] if run["state"] == "failed"]
    assert [run["values"]["stages.head.lr"] for run in failed] == [2e-3]
    assert all("broken.pt" in run["detail"] and "is FAILED" in run["detail"] for run in failed), failed
    top1 = [run["best"]["top1"] for run in status["runs"] if run["state"] == "completed"]
    assert len(top1) == 2
    assert top1 == sorted(top1, reverse=True)
    assert status["runs"][-1:] == failed, "failed runs rank last"

    output = launched(partition, "sweep", sweep, "--dir", folder)
    assert "not submitted: 2 completed, 1 failed" in output
    assert "nothing to submit" in output
    model = build(ModelConfig("shufflenet_v2_x0_5", weights="none"), 1000, image_size=None, seed=0)
    torch.save(model.module.state_dict(), tmp_path / "broken.pt")
    output = launched(partition, "sweep", sweep, "--dir", folder, "--resubmit-failed")
    assert "1 trial" in output
    jobs = {read_record(Path(run["run_dir"]))["job_id"].partition("_")[0] for run in status["runs"][:2]}  # type: ignore[index]
    assert len(jobs) == 1, "completed trials are not submitted again"
    status = all_ended(partition, folder)
    assert [run["state"] for run in status["runs"]] == ["completed"] * 3
    assert "nothing to submit" in launched(partition, "sweep", sweep, "--dir", folder, "--resubmit-failed")


@concurrent()
def test_one_task_of_an_array_is_requeued_alone(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    slurm = f"partition: {partition.name}, gpus_per_node: 1, cpus_per_task: 1, time: 10"
    # The second task must still run when the first has started, which may be late on a busy machine.
    slow = "export SECONDS_A_STEP=$((1 + 3 * SLURM_ARRAY_TASK_ID))"
    setup = f"['export PYTHONPATH={inputs.slow_steps}', '{slow}']"
    (tmp_path / "sweep.yaml").write_text(f"name: pair\nseeds: [0, 1]\nslurm: {{{slurm}, setup: {setup}}}\n")
    folder = tmp_path / "sweep"
    launched(partition, "sweep", tmp_path / "sweep.yaml", *inputs.job_args, "--dir", folder)
    status = json.loads(launched(partition, "status", folder, "--json"))
    run_dirs = {run["values"]["seed"]: Path(run["run_dir"]) for run in status["runs"]}
    first, second = run_dirs[0], run_dirs[1]
    wait_until(lambda: all((path / "attempt.json").exists() for path in (first, second)))
    # The last task of an array has the job id of the whole array. It must not requeue by that.
    partition.run("scancel", "--signal=USR2", read_record(second)["job_id"])  # type: ignore[index]
    all_ended(partition, folder)
    restarts = [read_attempt(path / "attempt.json")["restarts"] for path in (first, second)]  # type: ignore[index]
    assert restarts == [0, 1]
    same_run(first, inputs.reference(1))
    one_run_of_wandb(inputs, second)


# Rank 0 waits after its first cell until the test has sent a signal, on the first start of the job.
WAITS = """
import os, time
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    replace = os.replace
    def slow(source, target, **options):
        replace(source, target, **options)
        if "/cells/" in str(target):
            for _ in range(3000):
                if os.path.exists({go!r}):
                    break
                time.sleep(0.1)
    os.replace = slow
"""


@concurrent()
def test_a_selection_is_requeued_and_resumes(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    """On two nodes, which share the images and the heads of each cell."""
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/sitecustomize.py").write_text(WAITS.format(go=str(tmp_path / "go")))
    out = tmp_path / "found"
    grid = ["candidates=shufflenet_v2_x0_5", "sizes=[32,40]", "crops=[weights,squash]", "stages.head.epochs=1"]
    small = [arg for arg in inputs.small[:3] if not arg.startswith("data.image_size=")]
    args = [*small, *grid, "model.weights=none", "stages.head.search.lr=[0.1,0.01]"]
    slurm = {"partition": partition.name, "nodes": 2, "gpus_per_node": 1, "cpus_per_task": 1, "time": 10}
    options = [f"slurm.{key}={value}" for key, value in slurm.items()]
    setup = f"slurm.setup=[export PYTHONPATH={tmp_path}/hooks]"
    launched(partition, "select", *args, "distributed.device=cpu", *options, setup, "--out", out)
    job = json.loads((out / "submitted.json").read_text())["job_id"]
    wait_until(lambda: list((out / "cells").glob("*.json")))
    partition.run("scancel", "--signal=USR2", job)
    (tmp_path / "go").touch()
    partition.wait_for(job, "COMPLETED")
    found = json.loads((out / "select.json").read_text())
    assert (found["ranks"], len(found["rows"]), len(found["left_out"])) == (2, 4, 0)
    assert read_attempt(out / "attempt.json")["restarts"] == 1  # type: ignore[index]
    log = launched(partition, "logs", out)
    assert re.search(r"[1-3] of 4 cells are saved", log)
    assert log.count("now shufflenet_v2_x0_5 32 px weights") == 1, "the first cell is not searched again"
    assert "completed" in launched(partition, "status", out)
