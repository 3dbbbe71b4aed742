"""Exact evaluation: every sample once, over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.data.loader import Batch, Loader
from distil_tl.distributed.collectives import gather_rows
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.metrics import ClassificationMetrics
from distil_tl.training.network import Network
from distil_tl.utils.log import Progress


@dataclass
class Evaluation:
    """Metrics over a whole split, on all ranks alike.

    `mistakes` are the surest wrong predictions: (index, target, prediction, probability).
    """

    metrics: ClassificationMetrics
    mistakes: list[tuple[int, int, int, float]]


@torch.no_grad()
def evaluate(
    info: DistInfo,
    network: Network,
    loader: Loader,
    batches: Iterator[Batch],
    num_classes: int,
    *,
    agreement: Agreement | None = None,
    confusion: bool = False,
    keep_mistakes: int = 0,
    show: bool = False,
) -> Evaluation:
    """Evaluate every sample once. Each rank runs its own share, of whatever length, and only counts are combined.

    `batches` are the loader's, with bad images dealt with.

    Raises:
        StopAgreedError: all ranks agreed to stop before the end; on all of them alike.
    """
    was_training = network.training
    network.eval()
    metrics = ClassificationMetrics(num_classes, info.device, confusion=confusion)
    mistakes = torch.empty(0, 4, dtype=torch.float64)
    # Rank 0 has the most batches; the others go through as many turns, so that all can agree in each of them.
    turns = math.ceil(math.ceil(len(loader.dataset) / info.world_size) / (loader.batch_size or 1))  # type: ignore[arg-type]
    bar = Progress("evaluate", turns, show=show and info.is_main)
    for _ in range(turns):
        if agreement is not None:
            agreement.check()
        batch = next(batches, None)
        if batch is None:
            continue
        targets = batch.targets.to(info.device, non_blocking=True)
        logits = network(batch.images.to(info.device, non_blocking=True))
        valid = batch.valid.to(info.device, non_blocking=True)
        metrics.update(logits, targets, F.cross_entropy(logits, targets, reduction="none"), valid)
        if keep_mistakes:
            mistakes = _surest(torch.cat([mistakes, _wrong(logits, targets, batch)]), keep_mistakes)
        bar.advance()
    bar.close()
    network.train(was_training)
    if keep_mistakes:
        mistakes = _surest(gather_rows(info, mistakes, keep_mistakes), keep_mistakes)
    rows = [(int(i), int(t), int(p), probability) for i, t, p, probability in mistakes.tolist()]
    return Evaluation(metrics.reduce(info), rows)


def _wrong(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    """Rows (index, target, prediction, probability) of the wrong predictions, float64 [M, 4] on the CPU."""
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    columns = (batch.indices.to(targets.device), targets, predicted, probability)
    rows = torch.stack([column.double() for column in columns], dim=1)
    return rows[(predicted != targets) & batch.valid.to(targets.device)].cpu()


def _surest(rows: Tensor, count: int) -> Tensor:
    # By probability, then by index, so that ties come in one order on any number of ranks.
    order = sorted(range(len(rows)), key=lambda i: (-rows[i, 3].item(), rows[i, 0].item()))
    return rows[order[:count]]
