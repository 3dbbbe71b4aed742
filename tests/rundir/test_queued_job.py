"""What is said of a Slurm job of the same run when another process trains it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from distil_tl.rundir.queued_job import RECORD_FILE, warn_of_queued_job
from launch import records
from tests.helpers.fake_slurm import FakeSlurm


def test_the_file_is_that_of_launch() -> None:
    assert RECORD_FILE == records.RECORD_FILE


def said(run_dir: Path, caplog: pytest.LogCaptureFixture, **environ: str) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "distil_tl"):
        warn_of_queued_job(run_dir, environ)
    return caplog.text


def test_a_queued_job_of_the_same_run_is_named(
    slurm: FakeSlurm, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("distil_tl"), "propagate", True)
    assert said(tmp_path, caplog) == "", "no job was submitted"
    record = {"job_id": "7_1", "cluster": "slurm", "time": "2026-11-28T22:00:00+00:00"}
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    assert said(tmp_path, caplog) == "", "Slurm has forgotten it"
    slurm.add("7_1", "PENDING")
    warning = said(tmp_path, caplog)
    assert "job 7_1, which was submitted for this run, is PENDING: when it starts" in warning
    assert f"distil-tl cancel {tmp_path}" in warning
    assert said(tmp_path, caplog, SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1") == "", "it is this"
    assert said(tmp_path, caplog, SLURM_JOB_ID="9")
    slurm.change("7_1", "CANCELLED")
    assert said(tmp_path, caplog) == ""
    slurm.change("7_1", "PENDING")
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    assert said(tmp_path, caplog) == ""
    for content in ("", "[]", '{"job_id": "7"}', '{"job_id": "7", "cluster": "local"}'):
        (tmp_path / RECORD_FILE).write_text(content)
        assert said(tmp_path, caplog) == ""
