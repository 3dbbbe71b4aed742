"""A search on a real Slurm: killed and gone on with, and a weak trial ended early."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.records import read_record
from tests.helpers.paths import ROOT
from tests.helpers.slurm_cluster import Cluster
from tests.system.test_slurm import SLOWLY, launched

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
SWEEP = """
random: {stages.head.lr: {choice: [0.01, 1.0e-12]}}
count: 2
metric: loss
slurm: {gpus_per_node: 2, cpus_per_task: 1, time: 10, setup: ['export PYTHONPATH=%s', export SECONDS_A_STEP=0.2]}
"""
SEARCH = """
import sys
from launch import adaptive
from launch import optuna_study
optuna_study.STARTUP = 1
optuna_study._Suggest.choice = lambda self, values: values[self.trial.number]  # the second one learns nothing
sys.exit(adaptive.main(sys.argv[1:]))
"""


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    yield slurm_cluster
    slurm_cluster.restore()


def test_a_search_is_killed_goes_on_and_prunes(cluster: Cluster, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "slowly").mkdir()
    (tmp_path / "slowly/sitecustomize.py").write_text(SLOWLY)
    (tmp_path / "sweep.yaml").write_text(SWEEP % (tmp_path / "slowly"))
    folder = tmp_path / "search"
    args = [str(tmp_path / "sweep.yaml"), *(arg for arg in small if "head.lr" not in arg), f"--dir={folder}"]
    command = [sys.executable, "-c", SEARCH, *args, "--parallel=1", "--poll=0.5"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 90
        while not list(folder.glob("*/metrics.jsonl")):
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    again = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    found = json.loads(launched(cluster, "status", folder, "--json"))["runs"]
    assert [(run["state"], run["values"]["stages.head.lr"]) for run in found] == [
        ("completed", 0.01),
        ("pruned", 1e-12),
    ]
    done, pruned = (read_record(Path(run["run_dir"])) for run in found)
    assert done is not None
    assert pruned is not None
    cluster.wait_for(pruned["job_id"], "CANCELLED")
    assert cluster.history(done["job_id"]) == ["COMPLETED"], "the job that was there went on"
    assert cluster.history(pruned["job_id"]) == ["CANCELLED"], "and did not come back"
    assert json.loads((Path(found[1]["run_dir"]) / "summary.json").read_text())["status"] == "preempted"
    assert len(list(folder.glob("*/submitted.json"))) == 2
    assert (folder / "slurm").stat().st_mode & 0o777 == 0o700
