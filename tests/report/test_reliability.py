"""The calibration of a run on its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_runs import build_evaluation, build_run, report

NAMES = ["daisy", "rose", "tulip"]


def changed(run: Path, calibration: Any) -> str:
    """The words of the page with this calibration on val."""
    path = run / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "calibration": calibration}))
    return report(run)[1]


def test_figures_of_val_and_test_before_and_after(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", NAMES)
    on_test = {**build_evaluation(NAMES), "split": "test"}
    on_test["calibration"]["raw"]["ece"] = 0.0987
    (run / "evaluation_test.json").write_text(json.dumps(on_test))
    page, words = report(run)
    assert "Temperature 1.38, fitted on val: the logits are divided by it before softmax, because the network" in words
    assert "network is overconfident" in words
    for row in (
        "val, as trained 550 12.0 % 0.5300 0.3200",
        "val, with temperature 550 1.0 % 0.4200 0.2100",
        "test, as trained 550 9.9 %",
    ):
        assert row in words
    assert page.count("Accuracy by confidence, ") == 2
    assert "50 images with a confidence of 60.0 % to 66.7 %" in words


def test_a_run_without_a_temperature(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", NAMES)
    raw = build_evaluation(NAMES)["calibration"]["raw"]
    words = changed(run, {"temperature": None, "reason": "there is one class", "raw": raw, "calibrated": None})
    assert "No temperature: there is one class." in words
    assert "val, as trained" in words
    assert "with temperature" not in words
    assert "underconfident" in changed(run, {"temperature": 0.5, "raw": raw})


@pytest.mark.parametrize(
    "calibration",
    [None, [], {"raw": 1}, {"raw": {"ece": None}}, {"raw": {"ece": "x", "bins": {}}}],
)
def test_earlier_runs_and_damaged_files_have_no_calibration(tmp_path: Path, calibration: Any) -> None:
    assert "Accuracy by confidence" not in changed(build_run(tmp_path / "run", NAMES), calibration)


def test_damaged_bins(tmp_path: Path) -> None:
    bins = [None, {}, {"low": "a"}, {"low": 0.2, "high": 0.1, "confidence": 7, "accuracy": -1, "n": None}]
    words = changed(build_run(tmp_path / "run", NAMES), {"temperature": "1", "raw": {"ece": 0.5, "bins": bins}})
    assert "No temperature was fitted." in words
    assert "Accuracy by confidence, val" in words
