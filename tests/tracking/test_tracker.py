"""metrics.jsonl always, Weights & Biases when it pleases."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distil_tl.tracking import tracker as tracking
from distil_tl.tracking.config import TrackingConfig, WandbConfig
from distil_tl.tracking.tracker import Tracker, wandb_task
from distil_tl.tracking.wandb.media import MAX_CHART_CLASSES, final_charts
from distil_tl.tracking.wandb.process import Marks, Rows, _put_aside, descendants, row_of
from distil_tl.utils.log import logger


def line(step: int, **more: Any) -> dict[str, Any]:
    fixed = {"epoch": 1, "stage": "head", "split": "train", "window": "interval", "loss": 0.5}
    return {"step": step, **fixed, **more}


def tracker(run_dir: Path, mode: str = "disabled", *, after_step: int = 0, **more: Any) -> Tracker:
    settings = TrackingConfig(wandb=WandbConfig(mode=mode, **more))
    found = Tracker(run_dir, settings, {"seed": 1})
    found.open(after_step=after_step)
    return found


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[int]:
    return [entry["step"] for entry in lines(run_dir)]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    return caplog


# metrics.jsonl


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    record = tracker(tmp_path)
    began = time.time()
    record.log(line(1))
    (entry,) = lines(tmp_path)
    assert began - 1 < entry.pop("time") < time.time() + 1
    assert entry == line(1)
    record.log(line(2, split="val"))
    assert steps(tmp_path) == [1, 2]
    record.close("completed")


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path):
    record = tracker(tmp_path)
    record.log(line(1, loss=float("nan"), lr=float("inf"), top1=0.5))
    record.close("completed")
    (entry,) = lines(tmp_path)
    assert (entry["loss"], entry["lr"], entry["top1"]) == (None, None, 0.5)


def test_going_on_takes_back_what_came_after_the_checkpoint(tmp_path: Path):
    record = tracker(tmp_path)
    for step in (10, 20, 20, 30, 40):
        record.log(line(step))
    record.close("completed")
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close("completed")
    assert steps(tmp_path) == [10, 20, 20, 21]


def test_a_fresh_start_takes_back_everything(tmp_path: Path):
    tracker(tmp_path).log(line(1))
    tracker(tmp_path).close("failed")
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    "cut",
    [
        "",
        "{",
        '{"step": 1',
        '{"step": 15, "epoch": 0, "loss": 0.',
        '{"epoch": 0}',
        "\0\0\0",
        "12",
        '{"step": null}',
        "\xff",
    ],
)
def test_a_last_line_that_was_cut_off_goes(tmp_path: Path, cut: str):
    record = tracker(tmp_path)
    record.log(line(10))
    record.close("completed")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(cut.encode("latin-1"))
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close("completed")
    assert steps(tmp_path) == [10, 21]


def test_a_last_line_that_lacks_only_its_newline_stays_a_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(10)))
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close("completed")
    assert steps(tmp_path) == [10, 21]


# Weights & Biases: what is sent


def test_a_row_has_curves_of_the_run_and_of_the_stage():
    assert row_of(line(3, lr=0.1, note="text", time=7.0, top5=None)) == {
        "train/loss": 0.5, "train/lr": 0.1, "epoch": 1, "stage": "head", "_timestamp": 7.0,
    }  # fmt: skip
    assert row_of(line(3, split="val", window="epoch", top1=0.9, lr=0.1)) == {
        "val/loss": 0.5, "val/top1": 0.9, "val/lr": 0.1, "epoch": 1, "stage": "head",
        "stage_head/val_loss": 0.5, "stage_head/val_top1": 0.9, "stage_head/epoch": 1,
    }  # fmt: skip


def test_a_row_is_whole_when_a_later_step_follows(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    rows = Rows(path)
    assert list(rows.whole()) == []
    with path.open("a") as file:
        file.write(json.dumps(line(1)) + "\n" + json.dumps(line(2, split="val"))[:20])
        file.flush()
        assert list(rows.whole()) == []
        file.write(json.dumps(line(2, split="val"))[20:] + "\n" + "no json\n")
        file.flush()
        assert [step for step, _ in rows.whole()] == [1]
        file.write(json.dumps(line(2)) + "\n" + json.dumps(line(5)) + "\n")
    ((step, row),) = rows.whole()
    assert (step, row["val/loss"], row["train/loss"]) == (2, 0.5, 0.5)
    assert list(rows.whole()) == []
    assert rows.last()[0] == 5


def test_the_id_is_made_once_and_stays(tmp_path: Path):
    tasks = [wandb_task(tmp_path, WandbConfig(mode="online", tags=["a"]), {"seed": 1}) for _ in range(2)]
    assert (tasks[0].name, tasks[0].mode, tasks[0].tags, tasks[0].config) == (
        tmp_path.name,
        "online",
        ["a"],
        {"seed": 1},
    )
    assert json.loads(json.dumps(asdict(tasks[0]))) == asdict(tasks[1])
    first = (tmp_path / "wandb-id").read_text()
    (tmp_path / "other").mkdir()
    wandb_task(tmp_path / "other", WandbConfig(), {})
    assert (tmp_path / "other" / "wandb-id").read_text() != first
    marks = Marks.of(tmp_path, "online")
    (tmp_path / "wandb").mkdir()
    marks.step = 7
    marks.save()
    assert Marks.of(tmp_path, "online") == marks
    (tmp_path / "wandb-id").write_text("another")
    assert Marks.of(tmp_path, "online").step == -1, "those are of another run"


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_a_killed_attempt_left_is_put_aside_unless_it_was_sent(tmp_path: Path, by_hand: bool):
    (tmp_path / "wandb-id").write_text("abc")
    left = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    left.mkdir(parents=True)
    if by_hand:
        (left / "run-abc.wandb.synced").touch()
    marks = Marks(tmp_path / "wandb" / "offline.json", "abc", step=9, safe=4, segment=left.name)
    _put_aside(tmp_path, marks)
    assert (marks.safe, marks.segment) == (9 if by_hand else 4, None)
    assert left.exists() == by_hand
    assert (left.parent / f"unfinished-{left.name}").exists() != by_hand


def test_charts_of_an_evaluation(tmp_path: Path):
    wandb = pytest.importorskip("wandb")
    Image.new("RGB", (400, 200)).save(tmp_path / "a.png")
    wrong = [
        {"path": str(tmp_path / name), "target": "a", "prediction": "b", "probability": 0.9}
        for name in ("a.png", "b.png")
    ]
    evaluation = {"split": "val", "classes": ["a", "b"], "confusion_matrix": [[3, 2], [0, 1]], "mistakes": wrong * 20}
    charts = final_charts(evaluation, 3)
    rows = charts["evaluation/mistakes"].data
    assert len(rows) == 3
    assert isinstance(rows[0][0], wandb.Image)
    assert (rows[0][0].image.width, rows[1][0]) == (64, None), "small, and none where the file is gone"
    assert rows[0][1:] == [str(tmp_path / "a.png"), "a", "b", 0.9]
    cells = charts["evaluation/confusion_matrix"].table.data
    assert cells == [["a", "a", 3], ["a", "b", 2], ["b", "a", 0], ["b", "b", 1]]
    assert final_charts({**evaluation, "classes": ["a"] * (MAX_CHART_CLASSES + 1)}, 0) == {}
    assert final_charts({}, 5) == {}


# Weights & Biases: the process


@pytest.fixture
def wandb_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "w"))


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    before = set(descendants(os.getpid()))
    yield
    assert set(descendants(os.getpid())) <= before


def test_disabled_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking, "Mirror", None)
    tracker(tmp_path).close("completed")
    assert not (tmp_path / "wandb-id").exists()


@pytest.mark.parametrize(
    ("process", "word", "said"),
    [
        ("import time; time.sleep(1000)", "completed", "it did not finish within 0.2 s"),
        ("import time; time.sleep(1000)", "preempted", "it did not finish within 0.2 s"),
        ("raise SystemExit(7)", "completed", "its process ended with status 7"),
        ("print('warn it is broken'); raise SystemExit(1)", "failed", "it is broken"),
    ],
)
def test_whatever_the_process_does_training_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: pytest.LogCaptureFixture,
    process: str,
    word: str,
    said: str,
):
    monkeypatch.setattr(tracking, "_START", process)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0)
    record = tracker(tmp_path, "online", finish_timeout_seconds=0.2 if "sleep" in process else 60)
    record.log(line(1))
    record.log(line(2))
    record.close(word)
    assert steps(tmp_path) == [1, 2]
    assert len(warnings.records) == 1  # said once, not at every line
    message = warnings.records[0].getMessage()
    assert f"Weights & Biases does not get everything: {said}. metrics.jsonl has it all" in message
    assert f"launch.sync {tmp_path}" in message


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    record = tracker(tmp_path, "online")
    record.log(line(1))
    record.close("completed")
    assert steps(tmp_path) == [1]
    assert "no process can be started" in warnings.records[0].getMessage()


def test_wandb_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture, wandb_folders: None
):
    (tmp_path / "wandb.py").write_text("raise ImportError('no module of that name')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = tracker(tmp_path, "online")
    record.log(line(1))
    record.close("completed")
    (warning,) = warnings.records
    assert "it can't be imported (no module of that name)" in warning.getMessage()
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


def test_wandb_offline_for_real(
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


def test_problems():
    assert TrackingConfig().problems() == []
    wrong = TrackingConfig(log_every=0, wandb=WandbConfig(mode="on", mistakes=-1, finish_timeout_seconds=0))
    problems = wrong.problems()
    assert problems[0] == "tracking.log_every must be at least 1"
    assert problems[1].startswith("tracking.wandb.mode is 'on'")
    assert [problem.split()[0] for problem in problems[2:]] == [
        "tracking.wandb.mistakes", "tracking.wandb.finish_timeout_seconds",
    ]  # fmt: skip
