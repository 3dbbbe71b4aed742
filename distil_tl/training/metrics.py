"""Classification metrics from counts, exact over any number of ranks."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from distil_tl.distributed.collectives import max_over_ranks, sum_over_ranks
from distil_tl.distributed.process_group import DistInfo

# A confusion matrix grows with the square of the number of classes: 128 MiB for 4,096 classes.
MAX_CONFUSION_CLASSES = 4096


def counts(classes: int) -> int:
    """The numbers that `ClassificationMetrics.of` takes."""
    return 4 + 3 * classes


def in_top_five(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each target is among the five largest logits; of equal ones the first classes are. bool [...].

    Args:
        logits: [..., C].
        targets: int64 [...].
    """
    own = logits.gather(-1, targets[..., None])
    ahead = logits == own  # in place, as there may be many heads
    ahead &= torch.arange(logits.shape[-1], device=logits.device) < targets[..., None]
    ahead |= logits > own
    return (ahead.sum(dim=-1) < 5) & ~own[..., 0].isnan()


class ClassificationMetrics:
    """Counts of predictions, kept on the device without synchronising.

    Args:
        num_classes: `C`.
        device: of the logits.
        confusion: also count pairs (target, prediction), for up to `MAX_CONFUSION_CLASSES` classes.
    """

    def __init__(self, num_classes: int, device: torch.device, *, confusion: bool = False) -> None:
        self.num_classes = num_classes
        # loss, n, top-1 and top-5 hits; then per class: hits, predictions, targets. Counts are exact in float64.
        self._sums = torch.zeros(counts(num_classes), dtype=torch.float64, device=device)
        self._confusion: Tensor | None = None
        if confusion and num_classes <= MAX_CONFUSION_CLASSES:
            self._confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, losses: Tensor, valid: Tensor) -> Tensor:
        """Add the valid samples of a batch: logits [N, C], targets int64 [N], losses [N], valid bool [N].

        Returns:
            The predicted classes, int64 [N].
        """
        c = self.num_classes
        predicted = logits.argmax(dim=1)
        counted = valid.double()
        hits = (predicted == targets) * counted
        in_top = in_top_five(logits, targets) * counted
        self._sums[0] += (losses.double() * counted).sum()
        self._sums[1] += counted.sum()
        self._sums[2] += hits.sum()
        self._sums[3] += in_top.sum()
        self._sums[4 : 4 + c].index_add_(0, targets, hits)
        self._sums[4 + c : 4 + 2 * c].index_add_(0, predicted, counted)
        self._sums[4 + 2 * c :].index_add_(0, targets, counted)
        if self._confusion is not None:
            self._confusion.index_add_(0, targets * c + predicted, valid.long())
        return predicted

    @classmethod
    def of(cls, sums: Tensor, num_classes: int) -> ClassificationMetrics:
        """Metrics from their sums, float64 [4 + 3 C]: loss, n, hits, hits among five; by class hits, predictions, n."""
        metrics = cls.__new__(cls)
        metrics.num_classes, metrics._sums, metrics._confusion = num_classes, sums, None
        return metrics

    def reduce(self, info: DistInfo) -> ClassificationMetrics:
        """These metrics over all ranks, as a new object; this one keeps counting its own. A collective."""
        total = ClassificationMetrics.__new__(ClassificationMetrics)
        total.num_classes = self.num_classes
        total._sums = sum_over_ranks(info, self._sums.clone()).cpu()
        total._confusion = None if self._confusion is None else sum_over_ranks(info, self._confusion.clone()).cpu()
        return total

    def since(self, earlier: Tensor) -> ClassificationMetrics:
        """The counts added after the sums `earlier`; both are over all ranks."""
        window = ClassificationMetrics.__new__(ClassificationMetrics)
        window.num_classes = self.num_classes
        window._sums = self._sums - earlier
        window._confusion = None
        return window

    def compute(self) -> dict[str, float]:
        """loss, top1, top5, macro_f1 and balanced_accuracy, as fractions.

        F1 is averaged over the classes with a target or a prediction, recall (balanced accuracy) over those with a
        target.
        """
        loss, n, top1, top5 = self._sums[:4].tolist()
        n = max(n, 1.0)
        return {
            "loss": loss / n,
            "top1": top1 / n,
            "top5": top5 / n,
            "macro_f1": self._macro_f1(),
            "balanced_accuracy": self._balanced_accuracy(),
        }

    @property
    def count(self) -> int:
        return int(self._sums[1].item())

    def _per_class(self) -> tuple[Tensor, Tensor, Tensor]:
        hits, predictions, targets = self._sums[4:].view(3, self.num_classes)
        return hits, predictions, targets

    def _macro_f1(self) -> float:
        hits, predictions, targets = self._per_class()
        seen = predictions + targets > 0
        if not bool(seen.any()):
            return 0.0
        return float((2 * hits[seen] / (predictions + targets)[seen]).mean())

    def _balanced_accuracy(self) -> float:
        hits, _, targets = self._per_class()
        seen = targets > 0
        return float((hits[seen] / targets[seen]).mean()) if bool(seen.any()) else 0.0

    def per_class(self, classes: tuple[str, ...] | list[str]) -> list[dict[str, Any]]:
        """One row per class: n, correct, predicted, recall, precision, f1. A ratio with denominator 0 is None."""
        rows = []
        columns = (column.tolist() for column in self._per_class())
        for name, hits, predictions, targets in zip(classes, *columns, strict=True):
            rows.append(
                {
                    "class": name,
                    "n": int(targets),
                    "correct": int(hits),
                    "predicted": int(predictions),
                    "recall": hits / targets if targets else None,
                    "precision": hits / predictions if predictions else None,
                    "f1": 2 * hits / (predictions + targets) if predictions + targets else None,
                }
            )
        return rows

    def confusion_matrix(self) -> list[list[int]] | None:
        """Rows are targets, columns predictions; None if it was not counted or has too many classes."""
        if self._confusion is None:
            return None
        matrix: list[list[int]] = self._confusion.view(self.num_classes, self.num_classes).tolist()
        return matrix


class Meter:
    """Training metrics of the current epoch and of the current log interval; both survive a restart.

    All methods except `start`, `update` and `load_state` are collectives.

    Attributes:
        waited: seconds of the current interval in which this rank waited for a batch.
    """

    def __init__(self, info: DistInfo, num_classes: int) -> None:
        self._info = info
        self._metrics = ClassificationMetrics(num_classes, info.device)
        self._interval_start = self._metrics._sums.cpu().clone()
        self._since = time.monotonic()
        self._carried = 0.0
        self.waited = 0.0
        self.update = self._metrics.update

    def start(self) -> None:
        """Start measuring time, in addition to the seconds of the interval before a restart."""
        self._since = time.monotonic() - self._carried
        self._carried = 0.0

    def add(self, sums: Tensor) -> None:
        """Add counts that are over all ranks, and equal on them."""
        if self._info.is_main:
            self._metrics._sums += sums

    def total(self) -> ClassificationMetrics:
        """The counts since the start of the epoch, over all ranks."""
        return self._metrics.reduce(self._info)

    def interval(self) -> tuple[ClassificationMetrics, float, float]:
        """The counts and seconds since the last call, and for how many the rank waited that waited longest.

        Starts a new interval.
        """
        total, now = self.total(), time.monotonic()
        counted, seconds = total.since(self._interval_start), now - self._since
        waited = max_over_ranks(self._info, self.waited)
        self._interval_start, self._since, self.waited = total._sums, now, 0.0
        return counted, seconds, waited

    def state(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._since
        return {
            "total": self.total()._sums,
            "interval_start": self._interval_start.clone(),
            "seconds": seconds,
            "data_wait_seconds": self.waited,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume counting. The saved sums are over all ranks, of any number, so rank 0 alone takes them."""
        if self._info.is_main:
            self._metrics._sums.copy_(state["total"])
        self._interval_start = state["interval_start"].clone()
        self._carried = state["seconds"]
        self.waited = state.get("data_wait_seconds", 0.0)  # checkpoints of earlier code have none
