"""Exact evaluation: every sample once, over any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.data.loader import Batch
from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.calibration import Calibration
from distil_tl.training.memory import PartSize
from distil_tl.training.metrics import ClassificationMetrics
from distil_tl.training.network import Network
from distil_tl.training.notable import Notable, Prediction
from distil_tl.utils.log import Progress

MISTAKES = 50  # most confident mistakes kept in evaluation.json


@dataclass
class Evaluation:
    """Metrics over a whole split, on all ranks alike.

    Attributes:
        metrics: counts.
        mistakes: the most confident wrong predictions.
        uncertain: the images whose two most probable classes are closest, right or wrong.
        calibration: with logits to fit a temperature; None where metrics alone were wanted.
        waited: seconds for which the rank waited for batches that waited longest.
    """

    metrics: ClassificationMetrics
    mistakes: list[Prediction]
    uncertain: list[Prediction]
    calibration: Calibration | None
    waited: float


# Ten parameters: training, the last evaluation and the command each need another part of them.
@torch.no_grad()
def evaluate(
    info: DistInfo,
    network: Network,
    turns: int,
    batches: Iterator[Batch],
    num_classes: int,
    *,
    part_size: PartSize | None = None,
    agreement: Agreement | None = None,
    mistakes: int | None = None,
    temperature: float | None = None,
    show: bool = False,
) -> Evaluation:
    """Evaluate every sample once. Each rank runs its own share; only counts are combined.

    Args:
        turns: batches of rank 0, which has the most. All ranks loop equally often, so that they can agree each time.
        batches: of this rank, on the device.
        part_size: how many images of a batch go through the network at once; all, if memory suffices.
        agreement: lets the ranks agree to stop before the end.
        mistakes: most confident mistakes to keep, beside uncertain images, a confusion matrix and calibration; None for
            metrics alone.
        temperature: with which calibration is counted, too.
        show: show progress on rank 0.

    Raises:
        AllRanksStopError: the ranks agreed to stop before the end; on all ranks alike.
    """
    part_size = part_size or PartSize("evaluation", "the evaluation")
    was_training = network.training
    network.eval()
    metrics = ClassificationMetrics(num_classes, info.device, confusion=mistakes is not None)
    notable = Notable(mistakes, num_classes, info.device) if mistakes else None
    calibration = None if mistakes is None else Calibration.empty(num_classes, info.device, temperature)
    waited, size = 0.0, 0
    with Progress("evaluate", turns, show=show and info.is_main) as bar:
        for _ in range(turns):
            if agreement is not None:
                agreement.raise_if_stopping()
            began = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - began
            if batch is None:
                continue
            count = len(batch.images)
            size = max(size, count) if network.is_compiled else count
            logits = part_size.apply(network, _padded(batch.images, size))[:count]
            losses = F.cross_entropy(logits, batch.targets, reduction="none")
            predicted = metrics.update(logits, batch.targets, losses, batch.valid)
            if calibration is not None:
                calibration.add(logits, predicted, batch)
            if notable is not None:
                notable.add(logits, batch)
            bar.advance()
    network.train(was_training)
    part_size.agree(info)
    wrong, uncertain = notable.gather(info) if notable is not None else ([], [])
    calibration = None if calibration is None else calibration.reduce(info)
    return Evaluation(metrics.reduce(info), wrong, uncertain, calibration, max_over_ranks(info, waited))


def _padded(images: Tensor, count: int) -> Tensor:
    """`images` [N, ...] followed by empty ones, `count` in all: the last batch has fewer than the others."""
    if len(images) == count:
        return images
    return torch.cat([images, images.new_zeros(count - len(images), *images.shape[1:])])
