"""Notable images of an evaluation: the most confident mistakes, and the images that were least certain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distil_tl.data.loader import Batch
from distil_tl.distributed.collectives import gather_rows
from distil_tl.distributed.process_group import DistInfo

TOP = 3  # predictions kept of each image
UNCERTAIN = 24  # images


class Prediction(NamedTuple):
    """The predictions for one image.

    Attributes:
        image: its number in the split.
        target: its class.
        target_probability: the probability of that class.
        top: the most probable classes with their probabilities, the first one first.
    """

    image: int
    target: int
    target_probability: float
    top: list[tuple[int, float]]


class Notable:
    """Collects the notable images of a rank on its device, without waiting for it.

    Args:
        mistakes: most confident mistakes to keep.
        num_classes: C.
    """

    def __init__(self, mistakes: int, num_classes: int, device: torch.device) -> None:
        self._counts, self._top = (mistakes, min(mistakes, UNCERTAIN)), min(TOP, num_classes)
        empty = torch.empty(0, 4 + 2 * self._top, dtype=torch.float64, device=device)
        self._kept = [empty, empty]

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Add a batch with its logits [N, C]."""
        probabilities = logits.softmax(dim=1)
        top, classes = probabilities.topk(self._top, dim=1)
        first, predicted = probabilities.max(dim=1)  # of equal probabilities the one that is counted in the metrics
        wrong = (predicted != batch.targets) & batch.valid
        second = top[:, 1] if self._top > 1 else torch.zeros_like(first)
        own = probabilities.gather(1, batch.targets[:, None])[:, 0]
        described = [batch.indices.to(logits.device, non_blocking=True), batch.targets, own]
        pairs = [column for pair in zip(classes.T, top.T, strict=True) for column in pair]
        for i, score in enumerate((first * wrong, (1 - (first - second)) * batch.valid)):
            rows = torch.stack([column.double() for column in (score, *described, *pairs)], dim=1)
            self._kept[i] = _highest(torch.cat([self._kept[i], rows]), self._counts[i])

    def gather(self, info: DistInfo) -> tuple[list[Prediction], list[Prediction]]:
        """The mistakes and the least certain images of all ranks, on all ranks alike. A collective."""
        found = []
        for rows, count in zip(self._kept, self._counts, strict=True):
            own = rows.cpu()
            everywhere = gather_rows(info, own[own[:, 0] > 0], count)
            found.append([_prediction(row) for row in _highest(everywhere, count).tolist()])
        return found[0], found[1]


def _prediction(row: list[float]) -> Prediction:
    _, index, target, own, *pairs = row
    top = [(int(name), probability) for name, probability in zip(pairs[::2], pairs[1::2], strict=True)]
    return Prediction(int(index), int(target), own, top)


def _highest(rows: Tensor, count: int) -> Tensor:
    """By score (column 0), then by index, so that the order of ties is the same on any number of ranks."""
    rows = rows[rows[:, 1].argsort(stable=True)]
    return rows[rows[:, 0].argsort(descending=True, stable=True)[:count]]
