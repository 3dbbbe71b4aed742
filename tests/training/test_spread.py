"""The intervals of heads on val: as those of evaluations, from sums that can be added."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distil_tl.training import spread as module
from distil_tl.training.batched_heads import count_predictions
from distil_tl.training.metrics import ClassificationMetrics, counts
from distil_tl.training.spread import Spread, width
from distil_tl.utils.intervals import bootstrap

CLASSES, IMAGES = 5, 300


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, 2, C] of two heads, targets, and which images are valid."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (IMAGES,), generator=random)
    logits = torch.randn(IMAGES, 2, CLASSES, generator=random) + F.one_hot(targets, CLASSES)[:, None]
    return logits, targets, torch.rand(IMAGES, generator=random) < 0.9


def spreads(*parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[Spread]:
    rows = sum(count_predictions(*part, spread=True) for part in parts)
    assert isinstance(rows, torch.Tensor)
    return [Spread.of(row, CLASSES) for row in rows]


def test_the_figures_and_intervals_are_those_of_an_evaluation() -> None:
    logits, targets, valid = batch(0)
    for head, found in enumerate(spreads((logits, targets, valid))):
        own = logits[:, head]
        losses = F.cross_entropy(own, targets, reduction="none")
        metrics = ClassificationMetrics(CLASSES, own.device, confusion=True)
        predicted = metrics.update(own, targets, losses, valid)
        matrix = np.zeros((CLASSES, CLASSES))
        np.add.at(matrix, (targets[valid].numpy(), predicted[valid].numpy()), 1)
        for name, expected in metrics.compute().items():
            assert found.value(name) == pytest.approx(expected)
        for name in ("macro_f1", "balanced_accuracy"):
            assert found.interval(name) == bootstrap(matrix.tolist())[name]
        low, high = found.interval("loss") or (0, 0)
        counted = losses[valid].double().numpy()
        assert (low + high) / 2 == pytest.approx(counted.mean())
        assert (high - low) / 2 == pytest.approx(1.96 * counted.std(ddof=1) / np.sqrt(len(counted)), rel=1e-4)


def test_those_of_parts_are_added() -> None:
    first, second = batch(1), batch(2)
    for whole, a, b in zip(spreads(first, second), spreads(first), spreads(second), strict=True):
        assert (a + b).dense() == pytest.approx(whole.dense())
        assert (a + b).interval("macro_f1") == whole.interval("macro_f1")


def test_of_many_classes_only_the_loss_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLASSES", CLASSES - 1)
    assert width(CLASSES) == counts(CLASSES) + 1
    found = spreads(batch(0))[0]
    assert found.interval("macro_f1") is None
    assert found.interval("loss") is not None
