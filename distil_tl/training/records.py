"""Records of training: the lines of metrics.jsonl, and the results of each stage in the state of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distil_tl.rundir.state import RunState
from distil_tl.training.config import rank_by
from distil_tl.training.metrics import ClassificationMetrics
from distil_tl.utils.intervals import of_counts

FIGURES = ("loss", "top1", "top5", "macro_f1", "balanced_accuracy")


@dataclass(frozen=True)
class Moment:
    """When something is recorded: the stage, its epoch (from 0), and the learning rate of the head."""

    stage: str
    epoch: int
    lr: float


def near(metric: str, found: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Whether an evaluation is within the 95 % interval of the best one. False if the metric is no share of images."""
    interval = of_counts(best).get(metric)
    return interval is not None and found[metric] >= interval[0]


class Records:
    """Records what training and evaluations count. Every rank keeps the state; rank 0 writes too.

    Args:
        state: of the run; its results and stage records are updated.
        write: writes a line of metrics.jsonl; None on other ranks than 0.
        global_batch_size: images of an optimizer step, over all ranks.
        metric: chooses the best evaluation.
        prefer_last: keep the last evaluation of the run where it is within the 95 % interval of the best one. The best
            of many evaluations on few images is partly luck; the last one is that of the smallest learning rate.
    """

    def __init__(
        self,
        state: RunState,
        write: Callable[[dict[str, Any]], None] | None,
        global_batch_size: int,
        metric: str = "top1",
        *,
        prefer_last: bool = False,
    ) -> None:
        self._prefer_last = prefer_last
        self._metric = metric
        self._state = state
        self._write = write
        self._global_batch_size = global_batch_size

    def add_interval(self, at: Moment, counted: ClassificationMetrics, seconds: float, waited: float) -> dict[str, Any]:
        """Record a log interval of training, in which a rank waited for batches. Returns the line written."""
        record = self._state.stages[at.stage]
        record.train_images += counted.count
        record.train_seconds += seconds
        record.epoch_seconds += seconds
        record.seconds += seconds
        record.data_wait_seconds += waited
        record.epoch_data_wait_seconds += waited
        return self._log(at, counted, seconds, waited, split="train", window="interval")

    def add_epoch(self, at: Moment, counted: ClassificationMetrics) -> dict[str, Any]:
        """Record an epoch of training, including the parts of it before a resume. Returns the line written."""
        record = self._state.stages[at.stage]
        record.train_top1 = counted.compute()["top1"]
        seconds, waited = record.epoch_seconds, record.epoch_data_wait_seconds
        record.epoch_seconds = record.epoch_data_wait_seconds = 0.0
        return self._log(at, counted, seconds, waited, split="train", window="epoch")

    def add_evaluation(
        self, at: Moment, counted: ClassificationMetrics, seconds: float, waited: float, *, is_last: bool = False
    ) -> bool:
        """Record the evaluation after an epoch, which may be the last one of the run. Returns whether it is kept."""
        record = self._state.stages[at.stage]
        line = self._log(at, counted, seconds, waited, split="val", window="epoch")
        kept = ("split", "n", *FIGURES, "stage", "epoch", "step")
        final = self._state.final = {**{key: line[key] for key in kept}, "metric": self._metric}
        record.epochs, record.top1 = at.epoch + 1, final["top1"]
        record.seconds += seconds
        if self._is_better(record.best):
            record.best = final
        return self._keep(is_last=is_last)

    def prefers_last(self, stage: str, epochs: int) -> bool:
        """Whether a stage has trained all its `epochs`, and val can't tell the last evaluation from its best one."""
        final, record = self._state.final, self._state.stages[stage]
        all_trained = self._prefer_last and record.epochs == epochs
        return all_trained and final is not None and record.best is not None and near(self._metric, final, record.best)

    def add_interpolation(
        self,
        stage: str,
        figures: Mapping[float, Mapping[str, Any]],
        alpha: float,
        seconds: float,
        *,
        is_last: bool = False,
    ) -> bool:
        """Record the evaluations of interpolated weights at the end of a stage, after that of its last epoch.

        Args:
            figures: by alpha; for alpha 1 those of an epoch of the stage, with `epoch`.
            alpha: the one chosen.
            is_last: of the run.

        Returns:
            Whether its evaluation is kept as the best so far.
        """
        record, last = self._state.stages[stage], self._state.final
        assert last is not None
        shown = dict.fromkeys(("top1", "loss", self._metric))
        rows = [{"alpha": each, **{key: found[key] for key in shown}} for each, found in figures.items()]
        epoch = figures[1.0]["epoch"]
        record.wise_ft = {
            "alpha": alpha, "epoch": epoch, "metric": self._metric, "seconds": seconds, "figures": rows,
        }  # fmt: skip
        record.seconds += seconds
        self._state.final = {**last, **{key: figures[alpha][key] for key in FIGURES}, "alpha": alpha}
        best = self._state.best
        is_other = best is not None and (best["stage"], best["epoch"]) != (stage, epoch)  # than alpha 1
        return self._keep(is_last=is_last and is_other)

    def _keep(self, *, is_last: bool) -> bool:
        """Keep the last evaluation if it is the best of the run so far, or preferred to it. Returns whether it is."""
        final, best = self._state.final, self._state.best
        is_kept = self._is_better(best)
        if not is_kept and is_last and self._prefer_last and final and best and near(self._metric, final, best):
            shown = ("stage", "epoch", "step", "alpha", self._metric)
            final = self._state.final = {**final, "instead_of": {key: best[key] for key in shown if key in best}}
            is_kept = True
        if is_kept:
            self._state.best = final
        return is_kept

    def _is_better(self, than: dict[str, Any] | None) -> bool:
        """Whether the last evaluation is better than an earlier one; None: there is none."""
        final = self._state.final
        return final is not None and (than is None or rank_by(self._metric, final) < rank_by(self._metric, than))

    def _log(
        self, at: Moment, counted: ClassificationMetrics, seconds: float, waited: float, *, split: str, window: str
    ) -> dict[str, Any]:
        """Write a line of metrics.jsonl. Returns it."""
        line = {
            "step": self._state.step,
            "epoch": at.epoch + 1,
            "stage": at.stage,
            "split": split,
            "window": window,
            "n": counted.count,
            **counted.compute(),
            "lr": at.lr,
            "images_per_second": counted.count / seconds if seconds else None,
            "seconds": seconds,
            "data_wait_seconds": waited,
            "samples_seen": self._state.step * self._global_batch_size,
        }
        if self._write is not None:
            self._write(line)
        return line
