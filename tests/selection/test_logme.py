"""LogME, compared with the evidence computed directly, and which backbones it leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distil_tl.selection.cells import Cell, Grid, Pruning, Result, Score
from distil_tl.selection.logme import logme
from distil_tl.selection.outcome import pruning_fields
from distil_tl.selection.pruning import LEAST, MOST, PER_CLASS, first_cells, some_of_each

RNG = np.random.default_rng(0)


def evidence(features: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """The logarithm of the evidence as in the paper, with the inverse of the whole matrix."""
    n, width = features.shape
    precision = alpha * np.eye(width) + beta * features.T @ features
    mean = beta * np.linalg.solve(precision, features.T @ y)
    error = ((features @ mean - y) ** 2).sum()
    return float(
        n / 2 * np.log(beta) + width / 2 * np.log(alpha) - n / 2 * np.log(2 * np.pi)
        - beta / 2 * error - alpha / 2 * mean @ mean - np.linalg.slogdet(precision)[1] / 2
    )  # fmt: skip


def density(features: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """The same as the normal density of y: accurate also without noise, where features explain every y."""
    covariance = features @ features.T / alpha + np.eye(len(y)) / beta
    return float(-(y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * np.pi * covariance)[1]) / 2)


def highest(features: np.ndarray, y: np.ndarray) -> float:
    """The highest evidence, by a search in both variances around the best pair so far."""
    explained = np.linalg.matrix_rank(features) == len(y)
    score, end = (density, 24) if explained else (evidence, 12)
    # There may be two peaks, with and without noise: begin at the best point of a grid.
    grid = [np.array([i, j], float) for i in range(-end, end + 1) for j in range(-end, end + 1)]
    step = 1.0
    best, at = max(((score(features, y, *np.exp(pair)), pair) for pair in grid), key=lambda found: found[0])
    while step > 1e-5:
        pairs = [at + step * np.array([i, j], float) for i in range(-2, 3) for j in range(-2, 3)]
        values = [score(features, y, *np.exp(np.clip(pair, -25, 25))) for pair in pairs]
        if max(values) > best + 1e-12:
            best, at = max(values), pairs[int(np.argmax(values))]
        else:
            step /= 2
    return best


@pytest.mark.parametrize(("n", "width", "rank"), [(40, 6, 6), (20, 50, 50), (40, 12, 4), (12, 30, 5)])
@pytest.mark.parametrize("seed", range(2))
def test_the_score_is_the_highest_evidence_of_the_paper(n: int, width: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, n)
    latent = rng.normal(size=(n, rank)) + 0.7 * (targets == 1)[:, None] + 0.3
    features = latent @ rng.normal(size=(rank, width))
    y = (targets == 0).astype(float)
    assert density(features, y, 2.0, 3.0) == pytest.approx(evidence(features, y, 2.0, 3.0))
    expected = np.mean([highest(features, (targets == c).astype(float)) for c in range(3)]) / n
    assert logme(features.astype(np.float64), targets) == pytest.approx(expected, abs=1e-6)


def test_better_features_have_a_higher_score_of_any_scale_or_number_of_classes() -> None:
    targets = np.repeat(np.arange(40), 5)  # more classes than are computed at once
    noise = RNG.normal(size=(200, 60))
    centers = RNG.normal(size=(40, 60))[targets]
    scores = [logme(noise + strength * centers, targets) for strength in (0.0, 0.5, 2.0)]
    assert scores == sorted(scores)
    assert logme(1e3 * (noise + 2.0 * centers), targets) == pytest.approx(scores[-1], abs=1e-4)
    assert np.isfinite(logme(np.zeros((200, 60)), targets))


def test_some_images_of_each_class() -> None:
    targets = RNG.permutation(np.repeat([0, 1, 2], [300, 7, 25]))
    chosen = some_of_each(targets, 0)
    assert np.bincount(targets[chosen]).tolist() == [PER_CLASS, 7, PER_CLASS]
    assert (some_of_each(targets, 0) == chosen).all()
    assert (some_of_each(targets, 1) != chosen).any()
    many = np.repeat(np.arange(1500), 7)
    drawn = np.bincount(many[some_of_each(many, 0)], minlength=1500)
    assert sorted(drawn.tolist()) == [0] * (1500 - MOST // LEAST) + [LEAST] * (MOST // LEAST)
    assert 0.4 < np.flatnonzero(drawn).mean() / 1500 < 0.6, "not the first ones by name"


def test_labels_matter_with_more_classes_than_images_are_used() -> None:
    targets = np.repeat(np.arange(1200), 6)
    chosen = some_of_each(targets, 0)
    features = RNG.normal(size=(len(targets), 64)) + 2 * RNG.normal(size=(1200, 64))[targets]
    right, wrong = (logme(features[chosen], labels) for labels in (targets[chosen], RNG.permutation(targets[chosen])))
    assert right > wrong


def test_the_cheapest_cell_of_a_backbone_is_scored() -> None:
    cells = [Cell(name, "none", size, crop, 1, size) for name in "ba" for size in (64, 32) for crop in ("x", "y")]
    assert [(cell.name, cell.image_size, cell.crop_mode) for cell in first_cells(Grid(cells, "top1"))] == [
        ("b", 32, "x"), ("a", 32, "x"),
    ]  # fmt: skip


def test_how_many_pairs_have_the_order_of_val() -> None:
    cells = [Cell(name, "none", 32, "x", 1, 1) for name in "abcd"]
    results = [
        Result(cell, "none", 10, {"top1": top1, "loss": 1 - top1}, [], "fp32", 8, None, 1.0)
        for cell, top1 in zip(cells, (0.5, 0.9, 0.7), strict=False)
    ]
    results.append(replace(results[0], cell=replace(cells[0], image_size=64), head={"top1": 0.1, "loss": 0.9}))
    pruning = Pruning(3, [Score(cell, -i, 5, 1.0) for i, cell in enumerate(cells)])
    for metric in ("top1", "loss"):
        ranked = sorted(results, key=lambda result: -result.head["top1"])
        found = pruning_fields(pruning, ranked, metric)
        assert (found["pairs"], found["same_order"]) == (3, 1)
    assert [score["kept"] for score in found["scores"]] == [True, True, True, False]
