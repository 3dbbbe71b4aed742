"""Confidence intervals, and how they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distil_tl.utils.intervals import bootstrap, of_counts, of_evaluation, plus_minus, wilson


def test_wilson() -> None:
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I.
    for correct, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) is None
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_the_bootstrap_draws_images_again() -> None:
    matrix = np.array([[40, 5, 0], [8, 20, 2], [0, 3, 6]])
    found = bootstrap(matrix.tolist())
    pairs = np.array([(i, j) for i in range(3) for j in range(3) for _ in range(matrix[i, j])])
    rng, f1, recall = np.random.default_rng(5), [], []
    for _ in range(2000):
        target, predicted = pairs[rng.integers(len(pairs), size=len(pairs))].T
        hits = [((target == c) & (predicted == c)).sum() for c in range(3)]
        f1.append(np.mean([2 * h / ((target == c).sum() + (predicted == c).sum()) for c, h in enumerate(hits)]))
        recall.append(np.mean([h / (target == c).sum() for c, h in enumerate(hits)]))
    for name, scores in (("macro_f1", f1), ("balanced_accuracy", recall)):
        assert found[name] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.012)
    assert found == bootstrap(matrix.tolist())
    assert bootstrap([[0, 0], [0, 0]]) == {}


def test_where_all_images_are_right_an_interval_still_has_a_width() -> None:
    for matrix, low, high in (
        ([[15, 0], [0, 15]], 1 - 0.2039 / 2, 1),
        ([[0, 15], [15, 0]], 0, 0.2039 / 2),
        ([[1000, 0], [0, 1]], 1 - 0.7935 / 2, 1),
    ):
        for interval in bootstrap(matrix).values():
            assert interval == pytest.approx((low, high), abs=0.012)


def test_intervals_of_an_evaluation() -> None:
    figures: dict[str, Any] = {"n": 20, "top1": 0.75, "top5": 1.0, "loss": 0.4}
    assert of_counts(figures) == {"top1": wilson(15, 20), "top5": wilson(20, 20)}
    assert of_counts({**figures, "n": None}) == of_counts({"top1": 0.5}) == of_counts({"n": 0, "top1": 0.5}) == {}
    matrix, figures = [[10, 2], [3, 5]], {**figures, "classes": ["a", "b"]}
    top1 = {"top1": wilson(15, 20)}
    assert of_evaluation({**figures, "confusion_matrix": matrix}) == {**top1, **bootstrap(matrix)}
    assert of_evaluation({**figures, "confusion_matrix": None}) == top1
    assert of_evaluation({**figures, "classes": list("abcdef")}) == of_counts(figures)


def test_plus_minus_is_half_the_width() -> None:
    assert plus_minus(0.812, (0.78, 0.83)) == "0.8120 ± 0.0250"
    assert plus_minus(0.812, None) == "0.8120"
