"""Records of training: the lines of metrics.jsonl, and the results of each stage in the state of the run."""

from __future__ import annotations

from typing import Any

from distil_tl.rundir.state import Position, RunState
from distil_tl.tracking.tracker import Tracker
from distil_tl.training.metrics import ClassificationMetrics
from distil_tl.training.optim import current_lr
from distil_tl.training.step import StageTraining


class Records:
    """Records what training and evaluations count. Every rank keeps the state; rank 0 writes too.

    Args:
        state: of the run; its results and stage records are updated.
        tracker: writes metrics.jsonl; None on other ranks than 0.
        global_batch_size: images of an optimizer step, over all ranks.
    """

    def __init__(self, state: RunState, tracker: Tracker | None, global_batch_size: int) -> None:
        self._state = state
        self._tracker = tracker
        self._global_batch_size = global_batch_size

    def add_interval(self, training: StageTraining, position: Position) -> dict[str, Any]:
        """Record a log interval of training. A collective. Returns the line written."""
        counted, seconds = training.meter.interval()
        record = self._state.stages[training.stage.name]
        record.train_images += counted.count
        record.train_seconds += seconds
        record.epoch_seconds += seconds
        record.seconds += seconds
        return self._log(training, position.epoch, ("train", "interval"), counted, seconds)

    def add_epoch(self, training: StageTraining, epoch: int, counted: ClassificationMetrics) -> None:
        """Record an epoch of training, including the parts of it before a resume."""
        record = self._state.stages[training.stage.name]
        record.train_top1 = counted.compute()["top1"]
        self._log(training, epoch, ("train", "epoch"), counted, record.epoch_seconds)
        record.epoch_seconds = 0.0

    def add_evaluation(
        self, training: StageTraining, epoch: int, counted: ClassificationMetrics, seconds: float
    ) -> bool:
        """Record the evaluation after an epoch. Returns whether it is the best so far."""
        record = self._state.stages[training.stage.name]
        line = self._log(training, epoch, ("val", "epoch"), counted, seconds)
        kept = ("split", "loss", "top1", "top5", "macro_f1", "stage", "epoch", "step")
        final = self._state.final = {key: line[key] for key in kept}
        record.epochs, record.top1 = epoch + 1, final["top1"]
        record.seconds += seconds
        best = self._state.best
        if best is None or (final["top1"], -final["loss"]) > (best["top1"], -best["loss"]):
            self._state.best = final
            return True
        return False

    def _log(
        self,
        training: StageTraining,
        epoch: int,
        kind: tuple[str, str],
        counted: ClassificationMetrics,
        seconds: float,
    ) -> dict[str, Any]:
        """Write a line of metrics.jsonl; `kind` is its split and its window."""
        line = {
            "step": self._state.step,
            "epoch": epoch + 1,
            "stage": training.stage.name,
            "split": kind[0],
            "window": kind[1],
            **counted.compute(),
            "lr": current_lr(training.optimizer),
            "images_per_second": counted.count / seconds if seconds else None,
            "seconds": seconds,
            "samples_seen": self._state.step * self._global_batch_size,
        }
        if self._tracker is not None:
            self._tracker.log(line)
        return line
