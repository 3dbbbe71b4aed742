"""The batches of one stage, loaded ahead over the ends of its epochs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from distil_tl.data.loader import Batch
from distil_tl.data.sampler import EvalBatches, TrainSampler
from distil_tl.data.source import ImageSource


@dataclass
class StageBatches:
    """The batches of a stage on this rank: one sequence for training, one for the evaluations after its epochs.

    So loader processes need not stop between epochs: during an evaluation they load the next epoch, and during an
    epoch they load the beginning of its evaluation, as far ahead as prefetch.py permits.
    """

    source: ImageSource
    sampler: TrainSampler
    loader: Iterable[Batch]
    val_sampler: EvalBatches
    val_loader: Iterable[Batch]
    more_evaluations: int = 0  # after that of the last epoch
    _train: Iterator[Batch] | None = None
    _val: Iterator[Batch] | None = None

    def start(self, epoch: int, consumed: int) -> None:
        """Start to load the training batches, from a position of the stage to its end."""
        self.sampler.set_position(epoch, consumed)
        self.val_sampler.passes = self.sampler.epochs - epoch + self.more_evaluations
        self._train = self.source.batches(self.loader, "train")

    def next(self) -> Batch:
        """The next training batch. Raises as `ImageSource.batches` does."""
        assert self._train is not None
        return next(self._train)

    def start_val(self) -> Iterator[Batch]:
        """Start to load the batches of the next evaluations, unless this was done. Returns all that are left."""
        if self._val is None:
            self._val = self.source.batches(self.val_loader, "val")
        return self._val

    def evaluation(self) -> Iterator[Batch]:
        """The batches of the next evaluation, which must all be taken before the one after it."""
        return itertools.islice(self.start_val(), self.val_sampler.per_pass)
