"""The lock of a run directory: only the newest attempt may write."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from distil_tl.rundir.lock import MAX_STUCK, Attempt, read_attempt
from distil_tl.train import main
from distil_tl.utils.errors import NoProgressError, SupersededError, UserError
from tests.helpers.ranks import forkserver, lines

train: Any = importlib.import_module("distil_tl.train")
JOB = {"SLURM_JOB_ID": "7"}


def train_slowly(args: list[str], said: Path) -> None:
    """A run that takes a second for each step, and writes its messages to a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    original = train.check_finite

    def check_finite(*rest: Any) -> None:
        time.sleep(1)
        original(*rest)

    train.check_finite = check_finite
    sys.exit(main(args))


def slow_training(args: list[str], said: Path) -> BaseProcess:
    """`train_slowly` in a separate process."""
    process = forkserver().Process(target=train_slowly, args=(args, said))
    process.start()
    return process


def wait_for_lines(run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts
    }


def test_a_run_directory_in_use_is_refused_by_name(small: list[str], tmp_path: Path, capsys) -> None:
    args = [*small, f"run_dir={tmp_path}/run", "checkpoint.every_steps=1"]
    first = slow_training(args, tmp_path / "said")
    try:
        wait_for_lines(tmp_path / "run", 1)
        assert main(args) == 2
        message = capsys.readouterr().err
        assert (
            f"{tmp_path}/run is in use: process {first.pid} on this machine has been working there since 20" in message
        )
        assert f"end it with `kill {first.pid}`, or choose another folder" in message
    finally:
        first.kill()
        first.join()
    assert main(args) == 0, "a dead process does not block the run"


def test_an_attempt_that_was_replaced_writes_nothing_more(small: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stale = slow_training([*small, f"run_dir={run_dir}", "checkpoint.every_steps=1"], tmp_path / "said")
    try:
        wait_for_lines(run_dir, 2)
        Attempt(run_dir).begin(step=1)
        time.sleep(1)  # wait for writes in progress
        before = content(run_dir)
        stale.join(240)
        said = (tmp_path / "said").read_text()
    finally:
        stale.kill()
    assert stale.exitcode == 1
    assert f"another process took over {run_dir} at 20" in said
    assert f"(process {os.getpid()} on " in said
    assert "Traceback" not in said
    assert content(run_dir) == before


def test_the_check_notices_only_another_attempt(tmp_path: Path) -> None:
    one, two = Attempt(tmp_path), Attempt(tmp_path)
    one.check()
    one.begin(0)
    one.check()
    two.begin(0)
    two.check()
    for act in (one.check, one.end):
        with pytest.raises(SupersededError):
            act()
    two.end()
    assert "ended_at" in json.loads((tmp_path / "attempt.json").read_text())
    (tmp_path / "attempt.json").write_text("")
    two.check()
    assert read_attempt(tmp_path / "attempt.json") is None


def test_which_directories_are_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Attempt(tmp_path).begin(0, JOB)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for environ in ({}, JOB, {"SLURM_JOB_ID": "8"}):
        with pytest.raises(UserError, match="is in use"):
            Attempt(tmp_path).refuse_if_in_use(environ)
    Attempt(tmp_path).refuse_if_in_use({**JOB, "SLURM_RESTART_COUNT": "1"})

    signed = json.loads((tmp_path / "attempt.json").read_text())
    for change in ({"process": "another machine"}, {"process": None}, {"ended_at": "now"}):
        (tmp_path / "attempt.json").write_text(json.dumps({**signed, **change}))
        Attempt(tmp_path).refuse_if_in_use({})


def test_a_copy_of_a_directory_in_use_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, link = tmp_path / "run", tmp_path / "link"
    run_dir.mkdir()
    link.symlink_to(run_dir)
    Attempt(run_dir).begin(0)
    shutil.copytree(run_dir, tmp_path / "copy")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    Attempt(tmp_path / "copy").refuse_if_in_use()
    for path in (run_dir, link):
        with pytest.raises(UserError, match="is in use"):
            Attempt(path).refuse_if_in_use()


FOREIGN = [b"", b"[1]", b"null", b'{"token": 1}', b'{"token": "a", "pid": 1, "process": ', b"\xff\xfe", b"{}"]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_damaged_or_foreign_lock_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    mine, path = Attempt(tmp_path), tmp_path / "attempt.json"
    path.write_bytes(content)
    mine.refuse_if_in_use({})
    mine.begin(0, {**JOB, "SLURM_RESTART_COUNT": "1"})
    assert read_attempt(path) is not None
    path.write_bytes(content)
    mine.check()
    mine.end()
    assert read_attempt(path) is not None


def test_of_two_that_start_at_once_the_second_is_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the directory free; while this one scans the images, the other one begins."""
    args = [*small, f"run_dir={tmp_path}/run", "checkpoint.every_steps=1"]
    others: list[BaseProcess] = []
    original = train.open_splits

    def open_splits(*args_: Any) -> Any:
        others.append(slow_training(args, tmp_path / "said"))
        wait_for_lines(tmp_path / "run", 1)
        return original(*args_)

    monkeypatch.setattr(train, "open_splits", open_splits)
    try:
        assert main(args) == 2
        assert f"{tmp_path}/run is in use: process {others[0].pid}" in capsys.readouterr().err
        signed = read_attempt(tmp_path / "run" / "attempt.json")
        assert signed is not None
        assert signed["pid"] == others[0].pid
        assert others[0].is_alive()
    finally:
        others[0].kill()
        others[0].join()


def test_restarts_without_progress_are_capped(tmp_path: Path) -> None:
    def restarted(count: int, step: int) -> None:
        Attempt(tmp_path).begin(step, {**JOB, "SLURM_RESTART_COUNT": str(count)})

    for count in range(MAX_STUCK + 1):
        restarted(count, 40)
    with pytest.raises(NoProgressError, match="restarted 4 times at step 40 without progress"):
        restarted(MAX_STUCK + 1, 40)
    restarted(MAX_STUCK + 1, 41)  # progress
    for count in range(MAX_STUCK + 2, 2 * MAX_STUCK + 2):
        restarted(count, 41)
    with pytest.raises(NoProgressError):
        restarted(2 * MAX_STUCK + 2, 41)
    restarted(0, 41)  # submitted again
    for _ in range(10):
        Attempt(tmp_path).begin(41, {})  # by hand
