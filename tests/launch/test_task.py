"""Training in a task of a job: folder, exit status, requeueing, ranks of a local job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distil_tl import train as training
from distil_tl.utils.errors import EXIT_PREEMPTED
from launch import task
from launch.task import TrainingTask, train_and_requeue
from tests.helpers.fake_slurm import FakeSlurm


@pytest.mark.parametrize(
    ("status", "environ", "requeues"),
    [
        (EXIT_PREEMPTED, {"SLURM_PROCID": "0"}, True),
        (EXIT_PREEMPTED, {"SLURM_PROCID": "1"}, False),
        (EXIT_PREEMPTED, {"SLURM_PROCID": "0", "RANK": "1"}, False),  # torchrun starts several in a Slurm task
        (EXIT_PREEMPTED, {"SLURM_PROCID": "1", "RANK": "0"}, True),
        (EXIT_PREEMPTED, {}, True),
        (0, {}, False),
        (1, {}, False),
        (2, {}, False),
    ],
)
def test_rank_0_requeues_a_preempted_job(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, status: int, environ: dict[str, str], requeues: bool
) -> None:
    slurm.add("7", "RUNNING")
    seen = []

    def train(args: list[str]) -> int:
        seen.append(args)
        return status

    monkeypatch.setattr(training, "main", train)
    for key, value in {**environ, "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(key, value)
    assert train_and_requeue(["a.yaml"]) == status
    assert bool(slurm.calls("scontrol")) is requeues
    assert task.main(["a.yaml", "slurm.nodes=2", "seed=1"]) == status
    assert seen == [["a.yaml"], ["a.yaml", "seed=1"]]


class Submitted:
    """submitit's word on the job that a task is of."""

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
        assert TrainingTask("a.yaml", str(tmp_path))() == EXIT_PREEMPTED, (
            "which is kept: its process has no exit status"
        )
        assert not slurm.calls("scontrol")
    monkeypatch.setattr("submitit.JobEnvironment", lambda: Submitted("slurm"))
    with pytest.raises(SystemExit):
        TrainingTask("a.yaml", str(tmp_path))()
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
    assert TrainingTask("a.yaml", str(tmp_path / "there"))() == 0
    assert seen == [(["a.yaml"], tmp_path / "there")]
    monkeypatch.setattr(training, "main", lambda args: 1)
    with pytest.raises(SystemExit) as ended:
        TrainingTask("a.yaml", str(tmp_path))()
    assert ended.value.code == 1


def test_ranks_of_a_local_job_use_the_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name may mean nothing, or an address that nobody listens to."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that all of them are put back
        monkeypatch.delenv(name)
    environ = {"JOB_ID": "123", "NTASKS": "2", "JOB_NUM_NODES": "1", "NODEID": "0", "GLOBALID": "1", "LOCALID": "1"}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    for name, value in environ.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    task.export_ranks()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("1", "2", "1")
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
