"""The folding benchmark measures training and evaluation, folded and not folded."""

from __future__ import annotations

from benchmarks.folding import measure


def test_training_and_evaluation_are_measured_folded_and_not_folded() -> None:
    rows = measure("resnet18", image_size=32, batch=2, rounds=2)
    assert [(row["step"], row["folded"]) for row in rows] == [
        ("training", True),
        ("training", False),
        ("evaluation", True),
        ("evaluation", False),
    ]
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)
