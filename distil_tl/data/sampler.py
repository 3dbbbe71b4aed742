"""Which sample comes when: a function of (seed, stage, epoch) alone, dealt out to however many ranks there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from distil_tl.utils.rng import keyed_seed


class SampleKey(NamedTuple):
    """A sample to load, and what its augmentation is drawn from.

    It travels to the loader's workers in place of a bare index, so that they need to know nothing of epochs.
    """

    image: int
    epoch: int
    position: int


def epoch_order(length: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """The permutation of `range(length)` for one epoch, int64 [length]."""
    generator = torch.Generator().manual_seed(keyed_seed(seed, "order", stage, epoch))
    return torch.randperm(length, generator=generator).numpy()


class TrainSampler(DistributedSampler[SampleKey]):
    """The training order, whose global batches do not depend on the world size.

    Global batch `s` is `order[s * B : (s + 1) * B]`; of it, rank `r` of `W` takes every `W`-th sample from the
    `r`-th, as `DistributedSampler` does. The tail that does not fill a batch is left out of this epoch (another
    one in each epoch, as the order changes).

    Args:
        length: number of images.
        global_batch_size: `B`; must be divisible by `world_size` and at most `length`.
        seed, stage: what the order is a function of, with the epoch.
    """

    def __init__(
        self, length: int, *, global_batch_size: int, world_size: int, rank: int, seed: int, stage: str
    ) -> None:
        if global_batch_size % world_size or global_batch_size > length:
            raise ValueError(f"global batch {global_batch_size}, world {world_size}, {length} images")
        super().__init__(cast(Any, range(length)), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.length = length
        self.stage = stage
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = length // global_batch_size
        self.consumed = 0

    def set_position(self, epoch: int, consumed: int = 0) -> None:
        """Go on in `epoch` after `consumed` samples, counted over all ranks: a multiple of the global batch."""
        if consumed % self.global_batch_size:
            raise ValueError(f"{consumed} samples are not a whole number of global batches")
        self.set_epoch(epoch)
        self.consumed = consumed

    @property
    def end(self) -> int:
        """Samples of an epoch over all ranks, the tail left out."""
        return self.steps_per_epoch * self.global_batch_size

    def __len__(self) -> int:
        return (self.end - self.consumed) // self.num_replicas

    def __iter__(self) -> Iterator[SampleKey]:
        order = epoch_order(self.length, self.seed, self.stage, self.epoch)
        for position in range(self.consumed + self.rank, self.end, self.num_replicas):
            yield SampleKey(int(order[position]), self.epoch, position)


class EvalSampler(DistributedSampler[SampleKey]):
    """Every sample once over all ranks: no padding, no dropping, so that shares may differ by one."""

    def __init__(self, length: int, *, world_size: int, rank: int) -> None:
        super().__init__(cast(Any, range(length)), num_replicas=world_size, rank=rank, shuffle=False)
        self.length = length

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.num_replicas))

    def __iter__(self) -> Iterator[SampleKey]:
        for index in range(self.rank, self.length, self.num_replicas):
            yield SampleKey(index, 0, index)
