"""Baselines, notes and settings of the report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distil_tl.report.confusion import Confusion
from distil_tl.report.figures import baseline, overfitting, settings
from distil_tl.report.load import Run, load_run
from tests.helpers.report_runs import build_evaluation, build_run, report

NAMES = ["daisy", "rose", "tulip"]


def test_the_baseline_is_the_largest_class() -> None:
    rows: list[Any] = [{"class": "a", "n": 30}, {"class": "b", "n": 70}, None, {"n": "x"}]
    assert baseline({"per_class": rows}) == ("b", 0.7)
    assert baseline({}) is None


def lines(val: list[float], train: list[float]) -> list[dict[str, Any]]:
    found = []
    for epoch, (of_val, of_train) in enumerate(zip(val, train, strict=True), start=1):
        line = {"step": epoch, "epoch": epoch, "stage": "full", "top1": 0.5}
        found += [
            {**line, "split": "train", "window": "epoch", "loss": of_train},
            {**line, "split": "val", "loss": of_val},
        ]
    return found


@pytest.mark.parametrize(
    ("val", "train", "said"),
    [
        ([0.9, 0.5, 0.6, 0.7], [1.0, 0.5, 0.3, 0.1], True),
        ([0.9, 0.5, 0.51, 0.52], [1.0, 0.5, 0.3, 0.1], False),
        ([0.9, 0.5, 0.6, 0.7], [1.0, 0.5, 0.6, 0.7], False),
        ([0.5, 0.7], [0.5, 0.1], False),
    ],
)
def test_overfitting_is_said(tmp_path: Path, val: list[float], train: list[float], said: bool) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(val, train)))
    found = overfitting(load_run(tmp_path))
    assert (found is not None) == said
    if found:
        assert "since epoch 2 of stage full the loss on val has risen from 0.500 to 0.700" in found[1]
        assert found[0] == 2


def test_the_settings_that_matter() -> None:
    config = "model: {name: resnet50, weights: torchvision/V2}\ndata: {root: /data/flowers/, balance: none}\nseed: 3\n"
    assert settings(Run("run", Path(), [], config=config)) == [
        ("Model", "resnet50"),
        ("Weights", "V2"),
        ("Images", "flowers"),
        ("Seed", "3"),
    ]
    assert settings(Run("run", Path(), [], config="}")) == []
    config = "data: {root: ., labels: a/labels.csv}\nrun_dir: runs/photos\n"
    assert settings(Run("photos", Path("/x/pictures/runs/photos"), [], config=config)) == [
        ("Images", "pictures, labels.csv")
    ]


def test_the_classes_with_the_most_mistakes_follow_those_that_they_are_confused_with() -> None:
    rows: list[list[float]] = [[9, 0, 0, 1], [0, 5, 4, 0], [0, 3, 6, 1], [0, 0, 0, 9]]
    found = Confusion(list("abcd"), rows, [10, 9, 10, 9]).with_most_mistakes(3)
    assert found.names == ["b", "c", "a"]
    assert found.rows == [[5, 4, 0], [3, 6, 0], [0, 0, 9]]
    assert found.totals == [9, 10, 10]


def test_what_newer_runs_add_is_on_the_page(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", NAMES)
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "config.yaml").write_text("data: {root: /data/flowers}\n")
    top = [{"class": "rose", "probability": 0.5}, {"class": "tulip", "probability": 0.4}]
    entry = {"path": "/data/flowers/val/tulip/x.jpg", "target": "tulip", "prediction": "rose", "probability": 0.5}
    evaluation["uncertain"] = [{**entry, "target_probability": 0.4, "top": top}]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    (run / "evaluation_test.json").write_text(json.dumps({**build_evaluation(NAMES, per=50), "split": "test"}))
    (run / "index").mkdir()
    names = np.frombuffer(b"daisy\0rose\0tulip", dtype=np.uint8)
    np.savez(run / "index" / "train.npz", classes=names, targets=np.array([0] * 1234 + [1, 2]))
    (run / "samples").mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (20, 5)).save(picture, "JPEG")
    (run / "samples" / "head.jpg").write_bytes(picture.getvalue())
    page, words = report(run)
    uncertain = words[words.index("Least certain") :]
    assert "val/tulip/x.jpg tulip 40.0 % rose tulip 40.0 %" in uncertain
    assert "/data/flowers/val" not in page
    assert "Always \u201cdaisy\u201d" in words
    assert "Top-5" not in words
    assert "Training images of stage head" in page
    assert "1,234" in words[words.index("Trained on") :]
    assert "distil-tl export run -o model.onnx" in words
    test = words[words.index("Test The best") :]
    assert "Images 150" in test


def test_a_run_that_overfitted_is_not_to_be_trained_longer(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    _, words = report(run)
    assert "distil-tl extend run" in words
    overfitted = lines([0.9, 0.5, 0.6, 0.7], [1.0, 0.5, 0.3, 0.1])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in overfitted))
    _, words = report(run)
    assert "distil-tl extend" not in words
    assert "distil-tl train run/config.yaml run_dir=run-fewer-epochs stages.full.epochs=2" in words


def test_a_run_that_did_not_complete_is_resumed(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "status": "preempted"}))
    _, words = report(run)
    assert "Run the same command again to resume this run." in words
    assert "distil-tl export" not in words
