"""Which evaluation is kept: the best one, or the last one where val can't tell them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distil_tl.rundir.state import RunState, StageRecord
from distil_tl.training.metrics import ClassificationMetrics
from distil_tl.training.records import Moment, Records


def counted(right: int, n: int = 100) -> ClassificationMetrics:
    """Metrics of `n` images in two classes, of which `right` are predicted correctly."""
    metrics = ClassificationMetrics(2, torch.device("cpu"))
    targets = torch.arange(n) % 2
    predicted = torch.where(torch.arange(n) < right, targets, 1 - targets)
    logits = torch.nn.functional.one_hot(predicted, 2).float()
    metrics.update(logits, targets, (predicted != targets).float(), torch.ones(n, dtype=torch.bool))
    return metrics


def evaluations(*right: int, prefer_last: bool = True, metric: str = "top1") -> tuple[dict[str, Any], list[bool]]:
    """What is kept after evaluations with so many correct images, and whether each was."""
    state = RunState(stages={"head": StageRecord()})
    records = Records(state, None, 8, metric, prefer_last=prefer_last)
    kept = [
        records.add_evaluation(Moment("head", i, 0.1), counted(each), 1.0, 0.0, is_last=i == len(right) - 1)
        for i, each in enumerate(right)
    ]
    assert state.best is not None
    return state.best, kept


def test_the_last_evaluation_is_kept_where_val_can_not_tell_it_from_the_best() -> None:
    best, kept = evaluations(70, 80, 72, 75)  # the interval of 80 in 100 begins at 0.711
    assert (best["epoch"], best["top1"], kept) == (4, 0.75, [True, True, False, True])
    assert best["instead_of"] == {"stage": "head", "epoch": 2, "step": 0, "top1": 0.8}


@pytest.mark.parametrize(
    ("right", "given"),
    [
        pytest.param((70, 80, 70), {}, id="below the interval"),
        pytest.param((70, 80, 79), {"prefer_last": False}, id="switched off"),
        pytest.param((70, 80, 79), {"metric": "macro_f1"}, id="no share of images"),
        pytest.param((70, 80, 60), {"metric": "loss"}, id="loss"),
    ],
)
def test_the_best_evaluation_is_kept_otherwise(right: tuple[int, ...], given: dict[str, Any]) -> None:
    best, kept = evaluations(*right, **given)
    assert (best["epoch"], kept) == (2, [True, True, False])
    assert "instead_of" not in best


@pytest.mark.parametrize(
    ("epochs", "end", "alphas", "expected"),
    [
        pytest.param("full:80 full:40", 1, {1.0: 80, 0.6: 78}, (0.80, None, None), id="no better than the best epoch"),
        pytest.param("full:80 full:40", 1, {1.0: 80, 0.6: 85}, (0.85, 0.6, None), id="better than every epoch"),
        pytest.param("full:70 full:80", 2, {1.0: 80, 0.6: 75}, (0.80, None, None), id="the best epoch is the last one"),
        pytest.param("full:80 full:78", 2, {1.0: 78, 0.6: 70}, (0.78, 1.0, 0.80), id="the last epoch is near the best"),
        pytest.param("full:80 full:78", 2, {1.0: 78, 0.6: 79}, (0.79, 0.6, 0.80), id="better than the last epoch"),
        pytest.param("head:80 full:75", 1, {1.0: 75, 0.6: 78}, (0.78, 0.6, 0.80), id="near another stage"),
        pytest.param("head:80 full:60", 1, {1.0: 60, 0.6: 61}, (0.80, None, None), id="far below another stage"),
    ],
)
def test_which_interpolated_weights_are_kept(
    epochs: str, end: int, alphas: dict[float, int], expected: tuple[float, float | None, float | None]
) -> None:
    """Top-1 on val, alpha, and the top-1 in whose place it is kept."""
    state = RunState(stages={name: StageRecord() for name in ("head", "full")})
    records = Records(state, None, 8, prefer_last=True)
    for stage, right in (epoch.split(":") for epoch in epochs.split()):
        moment = Moment(stage, state.stages[stage].epochs, 0.1)
        records.add_evaluation(moment, counted(int(right)), 1.0, 0.0)
    figures = {alpha: counted(right).compute() for alpha, right in alphas.items()}
    figures[1.0]["epoch"] = end
    kept = records.add_interpolation("full", figures, max(alphas, key=lambda a: alphas[a]), 1.0, is_last=True)
    best = state.best
    assert best is not None
    assert (best["top1"], best.get("alpha"), best.get("instead_of", {}).get("top1")) == expected
    assert kept == ("alpha" in best)


@pytest.mark.parametrize(("right", "prefer_last"), [((80, 40), True), ((80, 78), False)])
def test_a_last_epoch_is_not_preferred_far_below_the_best_one_or_by_another_rule(
    right: tuple[int, int], prefer_last: bool
) -> None:
    records = Records(RunState(stages={"full": StageRecord()}), None, 8, prefer_last=prefer_last)
    for epoch, count in enumerate(right):
        records.add_evaluation(Moment("full", epoch, 0.1), counted(count), 1.0, 0.0)
    assert not records.prefers_last("full", 2)


def test_the_last_epoch_of_a_stage_is_preferred_only_at_its_end() -> None:
    records = Records(RunState(stages={"full": StageRecord()}), None, 8, prefer_last=True)
    for epoch, count in enumerate((80, 78)):
        records.add_evaluation(Moment("full", epoch, 0.1), counted(count), 1.0, 0.0)
    assert (records.prefers_last("full", 2), records.prefers_last("full", 3)) == (True, False)


def test_a_last_evaluation_that_is_the_best_is_in_place_of_none() -> None:
    best, kept = evaluations(70, 80)
    assert (best["epoch"], kept, "instead_of" in best) == (2, [True, True], False)
