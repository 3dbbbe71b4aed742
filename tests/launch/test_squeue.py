"""Slurm's queue as squeue prints it."""

from __future__ import annotations

import shutil

import pytest

from launch import squeue
from launch.squeue import QueuedJob, SlurmUnavailableError, job_state, read_queue
from tests.helpers.fake_slurm import FakeSlurm


def test_the_queue_has_every_job_and_every_task(slurm: FakeSlurm) -> None:
    slurm.add("7", "RUNNING", nodes="n[1-2]")
    slurm.add("8_0", "RUNNING", own="9", nodes="n3")
    slurm.add("8_1", reason="Resources")
    slurm.add("8_2", own="10", reason="BeginTime")  # it was requeued
    slurm.add("11", "COMPLETED")
    found = read_queue()
    assert found["7"] == QueuedJob("7", "RUNNING", "n[1-2]", "None")
    assert found["9"] is found["8_0"]
    assert found["10"] is found["8_2"]
    assert "8" not in found, "a waiting task has no job id of its own"
    assert (found["8_1"].is_waiting, found["8_1"].is_active) == (True, True)
    assert (found["7"].is_waiting, found["7"].is_active) == (False, True)
    assert (found["11"].is_waiting, found["11"].is_active) == (False, False)
    assert "--me" in slurm.calls("squeue")[0]


def test_the_state_of_one_job(slurm: FakeSlurm) -> None:
    slurm.add("7", "RUNNING")
    slurm.add("8", "FAILED", restarts="3")
    assert (job_state("7"), job_state("8"), job_state("9")) == (("RUNNING", 0), ("FAILED", 3), (None, 0))


def test_names_that_are_not_utf_8_hide_no_job(slurm: FakeSlurm) -> None:
    """As in the comment of a job that another program submitted."""
    (slurm.folder / "squeue").write_text("#!/bin/sh\nprintf '7|7|RUNNING|n1|None|1:00|caf\\351|x\\n'\n")
    assert read_queue()["7"].state == "RUNNING"
    assert job_state("7") == ("7|7|RUNNING|n1|None|1:00|caf\ufffd|x", 0)


def test_slurm_that_does_not_answer_in_time(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shutil.which("squeue") == str(slurm.folder / "squeue")
    (slurm.folder / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(squeue, "TIMEOUT_S", 0.2)
    with pytest.raises(SlurmUnavailableError, match="squeue does not answer"):
        read_queue()
