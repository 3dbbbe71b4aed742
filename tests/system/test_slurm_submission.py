"""A submitter that is killed, on a real Slurm: the same command leaves each trial with one job, which trains."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.concurrent_tests import concurrent
from tests.helpers.paths import ROOT
from tests.helpers.slurm_cluster import Partition
from tests.helpers.slurm_jobs import Inputs, launched, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.xdist_group("slurm")]

SWEEP = """
name: NAME
seeds: [0, 1, 2]
slurm: {partition: PARTITION, gpus_per_node: 1, cpus_per_task: 1, time: 10, signal_delay_s: 20, extra: {hold: true}}
"""


def array(partition: Partition, name: str) -> list[str]:
    """The tasks of all arrays of that name."""
    return partition.run("squeue", "--noheader", "--array", f"--name={name}", "--format=%i").split()


@concurrent()
def test_a_killed_submitter_leaves_one_job_for_each_trial(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    """HUP and KILL once squeue shows the array, and KILL at random moments of the start."""
    chosen = random.Random(1)
    for number, how in enumerate((signal.SIGHUP, signal.SIGKILL, signal.SIGKILL)):
        name = f"{partition.name}-{number}"
        sweep = tmp_path / f"{name}.yaml"
        sweep.write_text(SWEEP.replace("NAME", name).replace("PARTITION", partition.name))
        args = [str(sweep), *inputs.small, "--dir", str(tmp_path / name), "--no-test"]
        submitter = subprocess.Popen(
            [sys.executable, "-m", "launch.sweep", *args],
            cwd=ROOT, env=partition.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        folder = tmp_path / name / "slurm"
        if number < 2:
            wait_until(lambda: array(partition, name) or submitter.poll() is not None)  # noqa: B023
        else:
            wait_until(lambda: (folder / ".open").exists())  # noqa: B023
            time.sleep(chosen.uniform(0, 0.2))
        os.kill(submitter.pid, how)
        submitter.wait()
        launched(partition, "sweep", *args)
        tasks = array(partition, name)
        records = [json.loads(path.read_text())["job_id"] for path in (tmp_path / name).glob("*/submitted.json")]
        assert len(tasks) == 3
        assert sorted(records) == sorted(tasks)
        assert not list((folder / ".open").iterdir())
    job = tasks[0]
    partition.run("scontrol", "release", job)
    partition.wait_for(job, "COMPLETED")
    (run_dir,) = (path.parent for path in (tmp_path / name).glob("*/summary.json"))
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "completed"
    partition.scancel(*{task.partition("_")[0] for task in tasks})
