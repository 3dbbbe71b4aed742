"""A search on a real Slurm: killed and started again, with a weak trial that is pruned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.records import read_record
from tests.helpers.concurrent_tests import concurrent
from tests.helpers.paths import ROOT
from tests.helpers.slurm_cluster import Partition
from tests.helpers.slurm_jobs import Inputs, launched, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.xdist_group("slurm")]
SWEEP = """
random: {stages.head.lr: {choice: [0.01, 1.0e-12]}}
count: 2
metric: loss
slurm:
  {partition: PARTITION, gpus_per_node: 1, cpus_per_task: 1, time: 10,
   setup: ['export PYTHONPATH=SLOW_STEPS', export SECONDS_A_STEP=1]}
"""
SEARCH = """
import sys
from launch import adaptive
from launch import optuna_study
optuna_study.STARTUP = 1
optuna_study._Suggest.choice = lambda self, values: values[self.trial.number]  # the second one learns nothing
sys.exit(adaptive.main(sys.argv[1:]))
"""


@concurrent(first=True)
def test_a_killed_search_continues_and_prunes(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    sweep = SWEEP.replace("PARTITION", partition.name).replace("SLOW_STEPS", str(inputs.slow_steps))
    (tmp_path / "sweep.yaml").write_text(sweep)
    folder = tmp_path / "search"
    args = [str(tmp_path / "sweep.yaml"), *(arg for arg in inputs.small if "head.lr" not in arg), f"--dir={folder}"]
    command = [sys.executable, "-c", SEARCH, *args, "--parallel=1", "--poll=0.5"]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=partition.environment, stdout=file, stderr=file)
    try:
        wait_until(lambda: list(folder.glob("*/metrics.jsonl")), output.read_text)
    finally:
        process.kill()
        process.wait()
    again = subprocess.run(
        command, cwd=ROOT, env=partition.environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    runs = json.loads(launched(partition, "status", folder, "--json"))["runs"]
    assert [(run["state"], run["values"]["stages.head.lr"]) for run in runs] == [
        ("completed", 0.01),
        ("pruned", 1e-12),
    ]
    completed, pruned = (read_record(Path(run["run_dir"])) for run in runs)
    assert completed is not None
    assert pruned is not None
    partition.wait_for(pruned["job_id"], "CANCELLED")
    assert partition.history(completed["job_id"]) == ["COMPLETED"], "the job of the killed search continued"
    assert partition.history(pruned["job_id"]) == ["CANCELLED"], "it was not requeued"
    assert json.loads((Path(runs[1]["run_dir"]) / "summary.json").read_text())["status"] == "preempted"
    assert len(list(folder.glob("*/submitted.json"))) == 2
    assert (folder / "slurm").stat().st_mode & 0o777 == 0o700
