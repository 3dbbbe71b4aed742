"""The tracking process: if it fails, training continues, and the user gets one warning."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distil_tl.tracking import tracker as tracker_module
from distil_tl.tracking.config import WandbConfig
from distil_tl.tracking.wandb import client
from distil_tl.tracking.wandb import process as tracking_process
from distil_tl.tracking.wandb.state import Marks
from distil_tl.tracking.wandb.task import wandb_task
from distil_tl.utils.log import logger
from distil_tl.utils.processes import descendants
from tests.helpers.metrics_lines import line, steps, tracker


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    return caplog


@pytest.fixture
def wandb_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "w"))


@pytest.fixture(autouse=True)
def _no_process_and_no_temporary_folder_is_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    before = set(descendants(os.getpid()))
    temporary = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert set(descendants(os.getpid())) <= before
    assert not list(temporary.glob("wandb-*")), "in which the process has its own"


def test_disabled_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracker_module, "WandbClient", None)
    tracker(tmp_path).close("completed")
    assert not (tmp_path / "wandb-id").exists()


@pytest.mark.parametrize(
    ("process", "status", "reason"),
    [
        ("import time; time.sleep(1000)", "completed", "the tracking process did not finish within 0.2 s"),
        ("import time; time.sleep(1000)", "preempted", "the tracking process did not finish within 0.2 s"),
        ("raise SystemExit(7)", "completed", "the tracking process exited with status 7"),
        ("print('warn it is broken.'); raise SystemExit(1)", "failed", "it is broken"),
    ],
)
def test_training_continues_if_the_process_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: pytest.LogCaptureFixture,
    process: str,
    status: str,
    reason: str,
):
    monkeypatch.setattr(client, "_START", process)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0)
    record = tracker(tmp_path, "online", finish_timeout_seconds=0.2 if "sleep" in process else 60)
    record.log(line(1))
    record.log(line(2))
    record.close(status)
    assert steps(tmp_path) == [1, 2]
    assert len(warnings.records) == 1  # once, not at every line
    message = warnings.records[0].getMessage()
    assert f"Weights & Biases does not have everything: {reason}. metrics.jsonl is complete" in message
    assert f"launch.sync {tmp_path}" in message


def test_the_warning_names_what_the_process_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waits = "import time; print('waits another process is sending this run', flush=True); time.sleep(1000)"
    monkeypatch.setattr(client, "_START", waits)
    started = client.WandbClient(wandb_task(tmp_path, WandbConfig(mode="online"), {}), quiet=True)
    deadline = time.monotonic() + 60
    while not started._waits_for:
        assert time.monotonic() < deadline
        started.poll()
    assert not started.end("completed", 0.05)
    expected = "the tracking process did not finish within 0.05 s (another process is sending this run)"
    assert started.reason == expected


def test_a_process_that_can_not_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    record = tracker(tmp_path, "online")
    record.log(line(1))
    record.close("completed")
    assert steps(tmp_path) == [1]
    assert "the tracking process can't be started" in warnings.records[0].getMessage()


def test_training_waits_for_the_process_of_an_earlier_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which runs on until it notices that another attempt took over: on a slow machine for longer than 15 s."""
    with (tmp_path / "lock").open("w") as earlier, (tmp_path / "lock").open("w") as lock:
        fcntl.flock(earlier.fileno(), fcntl.LOCK_EX)
        assert not tracking_process._locked(lock.fileno(), wait=False)
        waited = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if sum(waited) > 1000:
                fcntl.flock(earlier.fileno(), fcntl.LOCK_UN)

        monkeypatch.setattr(time, "sleep", sleep)
        assert tracking_process._locked(lock.fileno(), wait=True)
        assert sum(waited) > 1000


def test_wandb_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture, wandb_folders: None
):
    (tmp_path / "wandb.py").write_text("raise ImportError('no module of that name')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = tracker(tmp_path, "online")
    record.log(line(1))
    record.close("completed")
    (warning,) = warnings.records
    assert "wandb can't be imported (no module of that name)" in warning.getMessage()
    assert steps(tmp_path) == [1]


def test_wandb_has_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture, wandb_folders: None
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))  # with no netrc
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    record = tracker(tmp_path, "online")
    record.log(line(1))
    record.close("completed")
    (warning,) = warnings.records
    assert "wandb login" in warning.getMessage()


def test_offline_mode_with_the_real_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture, wandb_folders: None
):
    pytest.importorskip("wandb")
    record = tracker(tmp_path, "offline")
    record.log(line(1))
    record.close("completed")
    assert not warnings.records
    run_id = (tmp_path / "wandb-id").read_text()
    assert list(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert steps(tmp_path) == [1]
    marks = Marks.of(tmp_path, "offline")
    assert (marks.step, marks.safe, marks.segment, marks.done) == (1, 1, None, True)
