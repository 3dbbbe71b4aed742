"""What a task does with its Slurm job when training was asked to stop, and what ranks on one machine are told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from distil_tl.utils.errors import EXIT_PREEMPTED
from launch import squeue, task
from launch.requeue import requeue_if_running
from launch.squeue import QueuedJob, SlurmUnavailableError, job_state, read_queue
from launch.task import TrainingTask, train_and_requeue
from tests.helpers.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm-bin")
    monkeypatch.setenv("PATH", fake.path)
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SUBMITIT_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    return fake


def without(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A PATH with no Slurm, whatever this machine has."""
    (folder / "empty").mkdir()
    monkeypatch.setenv("PATH", str(folder / "empty"))


# State first


def test_a_running_job_goes_back_into_the_queue(slurm: FakeSlurm, capsys) -> None:
    slurm.add("7", "RUNNING", nodes="n1")
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == "job 7 is requeued"
    assert slurm.jobs["7"]["state"] == "PENDING"
    assert capsys.readouterr().err == "launch: job 7 is requeued\n"


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING", "CANCELLED", "PREEMPTED", "TIMEOUT"])
def test_a_job_in_any_other_state_is_left_to_slurm(slurm: FakeSlurm, state: str) -> None:
    slurm.add("7", state)
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == f"job 7 is {state}, so it is not requeued"
    assert not slurm.calls("scontrol")
    assert slurm.jobs["7"]["state"] == state


def test_a_job_that_slurm_has_forgotten_is_left_alone(slurm: FakeSlurm) -> None:
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == "job 7 is no longer known to Slurm, so it is not requeued"
    assert not slurm.calls("scontrol")


def test_one_task_of_an_array_takes_no_other_along(slurm: FakeSlurm) -> None:
    """Also the task that has the array's number for its own, by which scontrol would requeue all of them."""
    for number, own in enumerate(("8", "9", "7")):
        slurm.add(f"7_{number}", "RUNNING", own=own, nodes="n1")
    environ = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert requeue_if_running(environ) == "job 7_2 is requeued"
    assert [job["state"] for job in slurm.jobs.values()] == ["RUNNING", "RUNNING", "PENDING"]


def test_a_waiting_neighbour_in_the_array_does_not_hide_that_a_task_runs(slurm: FakeSlurm) -> None:
    slurm.add("7_1")
    slurm.add("7_0", "RUNNING", own="7", nodes="n1")
    environ = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    assert requeue_if_running(environ) == "job 7_0 is requeued"


def test_slurm_that_cannot_be_asked_is_no_reason_to_fail(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.add("7", "RUNNING")
    slurm.refuse("scontrol", "Requested operation is presently disabled")
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == (
        "job 7 can't be requeued (scontrol: Requested operation is presently disabled); submit it again to resume"
    )
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    assert "Unable to contact slurm controller); submit it again to resume" in requeue_if_running({"SLURM_JOB_ID": "7"})
    without(monkeypatch, tmp_path)
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == (
        "job 7 can't be requeued (squeue is not on this machine); submit it again to resume"
    )


def test_without_a_slurm_job_nothing_is_asked(slurm: FakeSlurm) -> None:
    assert requeue_if_running({}) == "no Slurm job"
    assert not slurm.calls("squeue")


# Who requeues, and when


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
def test_rank_0_requeues_a_job_that_was_asked_to_stop(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, status: int, environ: dict[str, str], requeues: bool
) -> None:
    slurm.add("7", "RUNNING")
    seen = []

    def train(args: list[str]) -> int:
        seen.append(args)
        return status

    monkeypatch.setattr("distil_tl.train.main", train)
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


def test_a_job_on_this_machine_does_not_requeue_the_slurm_job_it_was_started_in(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As from a notebook that is a Slurm job: it would end with all that is in it."""
    slurm.add("7", "RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("distil_tl.train.main", lambda args: EXIT_PREEMPTED)
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


def test_training_begins_where_it_was_submitted_and_its_status_is_the_tasks(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("submitit.JobEnvironment", lambda: Submitted("slurm"))
    seen = []

    def train(args: list[str]) -> int:
        seen.append((args, Path.cwd()))
        return 0

    monkeypatch.setattr("distil_tl.train.main", train)
    assert TrainingTask("a.yaml", str(tmp_path / "there"))() == 0
    assert seen == [(["a.yaml"], tmp_path / "there")]
    monkeypatch.setattr("distil_tl.train.main", lambda args: 1)
    with pytest.raises(SystemExit) as ended:
        TrainingTask("a.yaml", str(tmp_path))()
    assert ended.value.code == 1


def test_ranks_of_this_machine_meet_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
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


# What squeue says


def test_the_queue_has_every_job_and_every_task_once(slurm: FakeSlurm) -> None:
    slurm.add("7", "RUNNING", nodes="n[1-2]")
    slurm.add("8_0", "RUNNING", own="9", nodes="n3")
    slurm.add("8_1", reason="Resources")
    slurm.add("8_2", own="10", reason="BeginTime")  # it was requeued
    slurm.add("11", "COMPLETED")
    found = read_queue()
    assert found["7"] == QueuedJob("7", "RUNNING", "n[1-2]", "None")
    assert found["9"] is found["8_0"]
    assert found["10"] is found["8_2"]
    assert "8" not in found, "a task that waits has no number of its own"
    assert (found["8_1"].is_waiting, found["8_1"].is_active) == (True, True)
    assert (found["7"].is_waiting, found["7"].is_active) == (False, True)
    assert (found["11"].is_waiting, found["11"].is_active) == (False, False)
    assert "--me" in slurm.calls("squeue")[0]


def test_the_state_of_one_job(slurm: FakeSlurm) -> None:
    slurm.add("7", "RUNNING")
    slurm.add("8", "FAILED")
    assert (job_state("7"), job_state("8"), job_state("9")) == ("RUNNING", "FAILED", None)


def test_slurm_that_does_not_answer_in_time(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shutil.which("squeue") == str(slurm.folder / "squeue")
    (slurm.folder / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(squeue, "TIMEOUT_S", 0.2)
    with pytest.raises(SlurmUnavailableError, match="squeue does not answer"):
        read_queue()
