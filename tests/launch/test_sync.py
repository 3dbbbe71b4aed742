"""Runs without network that are sent later: one run on a real server, with each step once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from distil_tl.tracking.wandb.state import Marks, segments
from launch import sync
from launch.sync import Unsent, main, send
from tests.helpers.chaos import small_disk
from tests.helpers.wandb_runs import ALL, Run
from tests.helpers.wandb_server import Server, struck, tracked

OFFLINE = "tracking.wandb.mode=offline"


def offline(folder: Path, images: Path, server: Server, what: str) -> Run:
    """A run of two attempts without network, the first one struck in step 10."""
    run = Run(folder, images, OFFLINE)
    unreachable = {**server.environment, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    run.attempt(partial(struck, unreachable, run.dir, 10, what))
    run.attempt(partial(tracked, unreachable))
    run.finished()
    assert run.warnings() == []
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, folder: Path, wandb_server: Server) -> Run:
    return offline(tmp_path_factory.mktemp("killed"), folder, wandb_server, "kill all")


@pytest.fixture(autouse=True)
def _server(wandb_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in wandb_server.environment.items():
        monkeypatch.setenv(name, value)


def copied(run: Run, to: Path) -> Path:
    """The run in another folder, as another run of W&B."""
    shutil.copytree(run.dir, to, symlinks=True)
    (to / "wandb-id").write_text(f"copy{abs(hash(to)):x}"[:12])
    return to


def test_attempts_without_network_become_one_run(
    killed: Run, tmp_path: Path, wandb_server: Server, telling_server: Server,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    shutil.copytree(killed.dir, run_dir, symlinks=True)
    assert len(segments(run_dir)) == 1
    assert len(list(run_dir.glob("wandb/unfinished-offline-run-*"))) == 1, "of the attempt that was killed"
    assert main([str(run_dir), "--dry-run"]) == 0
    assert "run: 12 steps to send from 1 offline attempts" in capsys.readouterr().out
    assert main([str(run_dir)]) == 0
    assert "run: sent" in capsys.readouterr().out
    for server in (wandb_server, telling_server):
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert main([str(run_dir)]) == 0
        assert "run: nothing left to send" in capsys.readouterr().out
    assert wandb_server.steps(run_dir) == ALL
    assert wandb_server.steps(run_dir, "val/top1") == [6, 12]
    there = wandb_server.run(run_dir)
    assert there["state"] == "finished"
    assert (
        json.loads(there["summary_json"])["best/top1"]
        == json.loads((run_dir / "summary.json").read_text())["best"]["top1"]
    )


def by_hand(run_dir: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *map(str, segments(run_dir))]
    done = subprocess.run(command, cwd=run_dir, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_segments_also_join_when_they_are_sent_by_hand(
    folder: Path, tmp_path: Path, telling_server: Server, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With `wandb sync`. Then launch.sync sends only the final status, and no step is sent twice."""
    run = offline(tmp_path, folder, telling_server, "warn it")
    monkeypatch.setenv("WANDB_BASE_URL", telling_server.url)
    assert len(segments(run.dir)) == 2
    by_hand(run.dir)
    assert telling_server.steps(run.dir) == ALL
    assert main([str(run.dir)]) == 0
    assert telling_server.steps(run.dir) == ALL
    assert telling_server.query("select * from system_metrics where run_id = ?", (run.dir / "wandb-id").read_text())
    by_hand(run.dir)
    assert telling_server.steps(run.dir) == ALL
    assert telling_server.run(run.dir)["state"] == "finished"


def test_a_sweep(killed: Run, tmp_path: Path, wandb_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """One run can't be read, one was never for W&B: the others are sent, and next time only what failed."""
    sweep = tmp_path / "sweep"
    a, b, broken, plain = (copied(killed, sweep / name) for name in ("a", "b", "broken", "plain"))
    config = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(config + "\n}")
    (plain / "wandb-id").unlink()
    assert main([str(sweep)]) == 1
    said = capsys.readouterr().out
    assert "sweep/a: sent" in said
    assert "sweep/b: sent" in said
    assert "sweep/broken: can't read config.yaml" in said
    assert "1 of 3 failed; run the same command to retry" in said
    (broken / "config.yaml").write_text(config)
    assert main([str(sweep)]) == 0
    said = capsys.readouterr().out
    assert "sweep/a: nothing left to send" in said
    assert "sweep/broken: sent" in said
    for run_dir in (a, b, broken):
        assert wandb_server.steps(run_dir) == ALL
        assert wandb_server.run(run_dir)["state"] == "finished"


def test_a_server_that_does_not_answer(
    killed: Run, tmp_path: Path, wandb_server: Server, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir = copied(killed, tmp_path / "run")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main([str(run_dir), "--timeout", "3"]) == 1
    assert "run: the tracking process did not finish within 3 s" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.url)
    assert main([str(run_dir)]) == 0
    assert wandb_server.steps(run_dir) == ALL


def fill(path: Path) -> None:
    """Write until the disk is full."""
    for size in (1 << 20, 1 << 10):
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while file.write(bytes(size)):
                pass


def test_a_full_disk_while_it_sends(
    killed: Run, tmp_path: Path, wandb_server: Server, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with small_disk(tmp_path / "disk"):
        if not (tmp_path / "disk").is_mount():
            pytest.skip("this user may not mount a file system")
        run_dir, full = copied(killed, tmp_path / "disk" / "run"), tmp_path / "disk" / "full"

        def send_after(unsent: Unsent, timeout: float) -> None:
            fill(full)
            send(unsent, timeout)

        with monkeypatch.context() as patch:
            patch.setattr(sync, "send", send_after)
            assert main([str(run_dir)]) == 1
        said = capsys.readouterr()
        assert "No space left on device" in said.out
        assert "1 of 1 failed; run the same command to retry" in said.out
        assert "Traceback" not in said.out + said.err
        full.unlink()
        assert main([str(run_dir)]) == 0
        assert wandb_server.steps(run_dir) == ALL
        assert Marks.of(run_dir, "online").done


def test_what_is_sent_so_far_is_not_sent_again(
    killed: Run, tmp_path: Path, wandb_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is not at its end yet."""
    run_dir = copied(killed, tmp_path / "run")
    whole = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    summary = (run_dir / "summary.json").read_text()
    (run_dir / "metrics.jsonl").write_text("".join(whole[:6]))
    (run_dir / "summary.json").write_text('{"status": "preempted"}')
    for said in ("sent", "nothing left to send"):
        assert main([str(run_dir)]) == 0
        assert f"run: {said}\n" in capsys.readouterr().out
        assert wandb_server.steps(run_dir) == ALL[:5], "that a step has no more lines is known from the next one"
    (run_dir / "metrics.jsonl").write_text("".join(whole))
    (run_dir / "summary.json").write_text(summary)
    assert main([str(run_dir)]) == 0
    assert wandb_server.steps(run_dir) == ALL
    assert Marks.of(run_dir, "online").done


def test_errors_are_explained(
    killed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copied(killed, tmp_path / "run")

    def refused(*args: object) -> str:
        assert main([str(arg) for arg in args]) == 2
        return capsys.readouterr().err

    assert "is not a folder" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "contains no run for Weights & Biases" in refused(tmp_path / "empty")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert "pip install wandb" in refused(run_dir)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.ftruncate(-1, 0))  # an OSError, as of a full disk
        assert refused(run_dir) == (
            f"launch.sync: what is sent can't be noted in {run_dir}: Bad file descriptor. Nothing was sent\n"
        )
        assert main([str(run_dir), "--dry-run"]) == 0
        capsys.readouterr()
    monkeypatch.setenv("HOME", str(tmp_path))  # with no netrc
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main([str(run_dir)]) == 1
    assert "wandb login" in capsys.readouterr().out
