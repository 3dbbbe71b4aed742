"""The callable of a job: folder, exit status, requeueing, ranks of a local job."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from distil_tl import train as training
from distil_tl.utils.errors import EXIT_PREEMPTED
from launch.job import Training, export_ranks
from tests.helpers.fake_slurm import FakeSlurm


def test_the_pickled_name_and_fields_do_not_change() -> None:
    """A resumed search submits it to the code snapshot of the version that began the search."""
    assert (Training.__module__, Training.__qualname__) == ("launch.job", "Training")
    assert [field.name for field in dataclasses.fields(Training)] == ["config", "cwd"]


class Submitted:
    """submitit.JobEnvironment."""

    def __init__(self, cluster: str, num_tasks: int = 1) -> None:
        self.cluster, self.num_tasks = cluster, num_tasks


def test_a_local_job_does_not_requeue_the_slurm_job_around_it(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As from a notebook that is a Slurm job: it would end with all that is in it."""
    slurm.add("7", "RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(training, "main", lambda args: EXIT_PREEMPTED)
    for cluster in ("local", "debug"):
        monkeypatch.setattr("submitit.JobEnvironment", lambda cluster=cluster: Submitted(cluster))
        assert Training("a.yaml", str(tmp_path))() == EXIT_PREEMPTED, "which is kept: its process has no exit status"
        assert not slurm.calls("scontrol")
    monkeypatch.setattr("submitit.JobEnvironment", lambda: Submitted("slurm"))
    with pytest.raises(SystemExit):
        Training("a.yaml", str(tmp_path))()
    assert slurm.calls("scontrol") == [["requeue", "7"]]


def test_training_runs_in_the_folder_of_the_submission_and_its_status_is_the_tasks(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("submitit.JobEnvironment", lambda: Submitted("slurm"))
    seen = []

    def train(args: list[str]) -> int:
        seen.append((args, Path.cwd()))
        return 0

    monkeypatch.setattr(training, "main", train)
    assert Training("a.yaml", str(tmp_path / "there"))() == 0
    assert seen == [(["a.yaml"], tmp_path / "there")]
    monkeypatch.setattr(training, "main", lambda args: 1)
    with pytest.raises(SystemExit) as ended:
        Training("a.yaml", str(tmp_path))()
    assert ended.value.code == 1


def test_ranks_of_a_local_job_use_the_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's name may have no address, or one that no process listens on."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that all of them are put back
        monkeypatch.delenv(name)
    environ = {"JOB_ID": "123", "NTASKS": "2", "JOB_NUM_NODES": "1", "NODEID": "0", "GLOBALID": "1", "LOCALID": "1"}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    for name, value in environ.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    export_ranks()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("1", "2", "1")
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
