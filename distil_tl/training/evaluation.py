"""Exact evaluation: every sample once, over any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.data.loader import Batch
from distil_tl.distributed.collectives import gather_rows, max_over_ranks
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.metrics import ClassificationMetrics
from distil_tl.training.network import Network
from distil_tl.utils.log import Progress


@dataclass
class Evaluation:
    """Metrics over a whole split, on all ranks alike.

    Attributes:
        metrics: counts.
        mistakes: the most confident wrong predictions: (index, target, prediction, probability).
        waited: seconds for which the rank waited for batches that waited longest.
    """

    metrics: ClassificationMetrics
    mistakes: list[tuple[int, int, int, float]]
    waited: float


@torch.no_grad()
def evaluate(
    info: DistInfo,
    network: Network,
    turns: int,
    batches: Iterator[Batch],
    num_classes: int,
    *,
    agreement: Agreement | None = None,
    mistakes: int | None = None,
    show: bool = False,
) -> Evaluation:
    """Evaluate every sample once. Each rank runs its own share; only counts are combined.

    Args:
        turns: batches of rank 0, which has the most. All ranks loop equally often, so that they can agree each time.
        batches: of this rank, on the device.
        agreement: lets the ranks agree to stop before the end.
        mistakes: most confident mistakes to keep, beside a confusion matrix; None for metrics alone.
        show: show progress on rank 0.

    Raises:
        AllRanksStopError: the ranks agreed to stop before the end; on all ranks alike.
    """
    was_training = network.training
    network.eval()
    metrics = ClassificationMetrics(num_classes, info.device, confusion=mistakes is not None)
    kept, waited = torch.empty(0, 4, dtype=torch.float64), 0.0
    with Progress("evaluate", turns, show=show and info.is_main) as bar:
        for _ in range(turns):
            if agreement is not None:
                agreement.raise_if_stopping()
            began = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - began
            if batch is None:
                continue
            logits = network(batch.images)
            metrics.update(logits, batch.targets, F.cross_entropy(logits, batch.targets, reduction="none"), batch.valid)
            if mistakes:
                kept = _most_confident(torch.cat([kept, _mistakes(logits, batch)]), mistakes)
            bar.advance()
    network.train(was_training)
    if mistakes:
        kept = _most_confident(gather_rows(info, kept, mistakes), mistakes)
    rows = [(int(i), int(t), int(p), probability) for i, t, p, probability in kept.tolist()]
    return Evaluation(metrics.reduce(info), rows, max_over_ranks(info, waited))


def _mistakes(logits: Tensor, batch: Batch) -> Tensor:
    """Rows (index, target, prediction, probability) of the wrong predictions, float64 [M, 4] on the CPU."""
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    columns = (batch.indices.to(predicted.device), batch.targets, predicted, probability)
    rows = torch.stack([column.double() for column in columns], dim=1)
    return rows[(predicted != batch.targets) & batch.valid].cpu()


def _most_confident(rows: Tensor, count: int) -> Tensor:
    # By probability, then by index, so that the order of ties is the same on any number of ranks.
    order = sorted(range(len(rows)), key=lambda i: (-rows[i, 3].item(), rows[i, 0].item()))
    return rows[order[:count]]
