"""The sums of one evaluation from which intervals follow, where counts by class do not suffice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distil_tl.training.metrics import ClassificationMetrics, counts
from distil_tl.utils.intervals import Interval, Z, bootstrap

MAX_CLASSES = 200  # with more, pairs of target and prediction are not counted: many heads are evaluated at once


def width(classes: int) -> int:
    """The numbers of a `Spread`: these, the sum of squared losses, and each pair of target and prediction."""
    return counts(classes) + 1 + (classes**2 if classes <= MAX_CLASSES else 0)


def count_spread(losses: Tensor, predicted: Tensor, targets: Tensor, valid: Tensor, classes: int) -> Tensor:
    """What a `Spread` has besides counts, float64 [H, 1 + C * C] or, for many classes, [H, 1].

    Args:
        losses, predicted: of H heads, [B, H].
        targets: int64 [B].
        valid: bool [B].
    """
    counted = valid[:, None].expand(predicted.shape).double()
    squares = ((losses * valid[:, None]).double() ** 2).sum(dim=0)[:, None]
    if classes > MAX_CLASSES:
        return squares
    pairs = squares.new_zeros(len(squares), classes**2)
    pairs.scatter_add_(1, (targets[:, None] * classes + predicted).T, counted.T)
    return torch.cat([squares, pairs], dim=1)


@dataclass(frozen=True)
class Spread:
    """The sums of the evaluation of a head, without the many zeros. Those of several parts of the images can be added.

    Attributes:
        classes: their number, C.
        at: int64, which of the `width(C)` numbers are not 0.
        values: float64, these numbers.
    """

    classes: int
    at: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, row: Tensor, classes: int) -> Spread:
        found = row.double().cpu().numpy()
        at = np.flatnonzero(found)
        return cls(classes, at, found[at])

    def to_json(self) -> list[list[float]]:
        return [self.at.tolist(), self.values.tolist()]

    @classmethod
    def from_json(cls, classes: int, columns: list[list[float]]) -> Spread:
        at, values = columns
        return cls(classes, np.array(at, dtype=np.int64), np.array(values, dtype=np.float64))

    def __add__(self, other: Spread) -> Spread:
        return Spread.of(torch.from_numpy(self.dense() + other.dense()), self.classes)

    def dense(self) -> np.ndarray:
        row = np.zeros(width(self.classes))
        row[self.at] = self.values
        return row

    def value(self, metric: str) -> float:
        sums = torch.from_numpy(self.dense()[: counts(self.classes)])
        return ClassificationMetrics.of(sums, self.classes).compute()[metric]

    def interval(self, metric: str) -> Interval | None:
        """The 95 % interval of loss, by its standard error, or of macro_f1 and balanced_accuracy, as in evaluations."""
        row, first = self.dense(), counts(self.classes)
        if metric == "loss":
            n = row[1]
            if n < 2:
                return None
            mean = row[0] / n
            half = Z * math.sqrt(max(0.0, row[first] / n - mean**2) / (n - 1))
            return max(0.0, float(mean - half)), float(mean + half)
        if len(row) == first + 1:
            return None
        return bootstrap(row[first + 1 :].reshape(self.classes, self.classes).tolist()).get(metric)
