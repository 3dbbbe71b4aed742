"""The requeue rule: only a running job is requeued."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch.requeue import requeue_if_running
from tests.helpers.fake_slurm import FakeSlurm, without_slurm


def test_a_running_job_is_requeued(slurm: FakeSlurm, capsys) -> None:
    slurm.add("7", "RUNNING", nodes="n1")
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == "job 7 is requeued"
    assert slurm.jobs["7"]["state"] == "PENDING"
    assert capsys.readouterr().err == "launch: job 7 is requeued\n"


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING", "CANCELLED", "PREEMPTED", "TIMEOUT"])
def test_a_job_in_any_other_state_is_not_requeued(slurm: FakeSlurm, state: str) -> None:
    slurm.add("7", state)
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == f"job 7 is {state}, so it is not requeued"
    assert not slurm.calls("scontrol")
    assert slurm.jobs["7"]["state"] == state


def test_a_job_that_runs_again_is_not_requeued_by_a_process_of_its_earlier_start(slurm: FakeSlurm) -> None:
    slurm.add("7", "RUNNING", nodes="n1", restarts="2")
    again = "job 7 was requeued already and runs again, so it is not requeued"
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == again
    assert requeue_if_running({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}) == again
    assert not slurm.calls("scontrol")
    assert requeue_if_running({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "job 7 is requeued"


def test_a_job_that_slurm_no_longer_knows_is_not_requeued(slurm: FakeSlurm) -> None:
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == "job 7 is no longer known to Slurm, so it is not requeued"
    assert not slurm.calls("scontrol")


def test_only_the_own_task_of_an_array_is_requeued(slurm: FakeSlurm) -> None:
    """Also the task whose own id is that of the array, with which scontrol would requeue all tasks."""
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


def test_slurm_that_does_not_answer_is_no_error(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.add("7", "RUNNING")
    slurm.refuse("scontrol", "Requested operation is presently disabled")
    assert requeue_if_running({"SLURM_JOB_ID": "7"}, patience=0) == (
        "job 7 can't be requeued (scontrol: Requested operation is presently disabled); submit it again to resume"
    )
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    message = requeue_if_running({"SLURM_JOB_ID": "7"}, patience=0)
    assert "Unable to contact slurm controller); submit it again to resume" in message
    without_slurm(monkeypatch, tmp_path)
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == (
        "job 7 can't be requeued (squeue is not on this machine); submit it again to resume"
    )


def test_a_controller_that_is_restarted_is_asked_again(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.add("7", "RUNNING", nodes="n1")
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 5:
            slurm.refuse("squeue", None)

    slurm.refuse("squeue", "Unable to contact slurm controller")
    monkeypatch.setattr("launch.requeue.sleep", sleep)
    assert requeue_if_running({"SLURM_JOB_ID": "7"}) == "job 7 is requeued"
    assert pauses == [1, 2, 4, 8, 10]
    assert "Unable to contact slurm controller; trying again" in capsys.readouterr().err


def test_without_a_slurm_job_no_command_is_called(slurm: FakeSlurm) -> None:
    assert requeue_if_running({}) == "no Slurm job"
    assert not slurm.calls("squeue")


def test_a_signal_does_not_end_squeue(slurm: FakeSlurm) -> None:
    slurm.add("7", "RUNNING", nodes="n1")
    squeue = slurm.folder / "squeue"
    program = squeue.read_text().replace("#!/bin/sh\n", "#!/bin/sh\nkill -USR2 $$\n")
    squeue.write_text(program)
    assert requeue_if_running({"SLURM_JOB_ID": "7"}, patience=0) == "job 7 is requeued"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
