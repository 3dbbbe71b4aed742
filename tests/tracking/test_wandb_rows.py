"""What is sent to W&B: rows, the id of the run, offline segments, charts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from distil_tl.tracking.config import WandbConfig
from distil_tl.tracking.wandb.media import MAX_CHART_CLASSES, final_charts
from distil_tl.tracking.wandb.rows import Rows, row_of, summary_of
from distil_tl.tracking.wandb.state import Marks
from distil_tl.tracking.wandb.task import wandb_task
from tests.helpers.metrics_lines import line


def test_a_row_has_curves_of_the_run_and_of_the_stage():
    assert row_of(line(3, lr=0.1, note="text", time=7.0, top5=None)) == {
        "train/loss": 0.5, "train/lr": 0.1, "epoch": 1, "stage": "head", "_timestamp": 7.0,
    }  # fmt: skip
    assert row_of(line(3, split="val", window="epoch", top1=0.9, lr=0.1)) == {
        "val/loss": 0.5, "val/top1": 0.9, "val/lr": 0.1, "epoch": 1, "stage": "head",
        "stage_head/val_loss": 0.5, "stage_head/val_top1": 0.9, "stage_head/epoch": 1,
    }  # fmt: skip


def test_the_summary_has_numbers_alone():
    result = {
        "split": "test",
        "n": 9,
        "top1": 0.5,
        "top5": None,
        "step": 3,
        "metric": "top1",
        "intervals": {"top1": [0, 1]},
    }
    summary = {"status": "completed", "best": None, "test": result, "total_seconds": 4.0}
    assert summary_of(summary) == {"test/top1": 0.5, "test/step": 3, "total_seconds": 4.0}


def test_a_row_is_complete_when_a_later_step_follows(tmp_path: Path):
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
    assert Marks.of(tmp_path, "online").step == -1, "a file of another W&B run"


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_segment_of_a_killed_attempt_is_set_aside_unless_it_was_sent(tmp_path: Path, by_hand: bool):
    (tmp_path / "wandb-id").write_text("abc")
    left = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    left.mkdir(parents=True)
    if by_hand:
        (left / "run-abc.wandb.synced").touch()
    marks = Marks(tmp_path / "wandb" / "offline.json", "abc", step=9, safe=4, segment=left.name)
    marks.set_aside_segment(tmp_path)
    assert (marks.safe, marks.segment) == (9 if by_hand else 4, None)
    assert left.exists() == by_hand
    assert (left.parent / f"unfinished-{left.name}").exists() != by_hand


def test_charts_of_an_evaluation(tmp_path: Path):
    wandb = pytest.importorskip("wandb")
    Image.new("I;16", (400, 200), 4095).save(tmp_path / "a.png")
    wrong = [
        {"path": str(tmp_path / name), "target": "a", "prediction": "b", "probability": 0.9}
        for name in ("a.png", "b.png")
    ]
    evaluation = {"split": "val", "classes": ["a", "b"], "confusion_matrix": [[3, 2], [0, 1]], "mistakes": wrong * 20}
    charts = final_charts(evaluation, 3, [0, 4095])
    rows = charts["evaluation/mistakes"].data
    assert len(rows) == 3
    assert isinstance(rows[0][0], wandb.Image)
    assert (rows[0][0].image.width, rows[1][0]) == (64, None), "small, and none if the file is missing"
    assert rows[0][0].image.getpixel((2, 2)) == (255, 255, 255), "as the model saw it"
    assert rows[0][1:] == [str(tmp_path / "a.png"), "a", "b", 0.9]
    cells = charts["evaluation/confusion_matrix"].table.data
    assert cells == [["a", "a", 3], ["a", "b", 2], ["b", "a", 0], ["b", "b", 1]]
    assert final_charts({**evaluation, "classes": ["a"] * (MAX_CHART_CLASSES + 1)}, 0) == {}
    assert final_charts({}, 5) == {}
