"""Order of the samples: a function of (seed, stage, epoch), divided among any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from distil_tl.utils.rng import keyed_seed


class SampleKey(NamedTuple):
    """A sample to load, with the epoch and position that its augmentation depends on.

    The sampler yields such keys instead of indices, so that loader processes need no other state.
    """

    image: int
    epoch: int
    position: int


def epoch_order(length: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """The permutation of `range(length)` for one epoch, int64 [length]."""
    generator = torch.Generator().manual_seed(keyed_seed(seed, "order", stage, epoch))
    return torch.randperm(length, generator=generator).numpy()


class TrainSampler(DistributedSampler[SampleKey]):
    """The training order; global batches do not depend on the world size.

    Global batch `s` is `order[s * B : (s + 1) * B]`. Rank `r` of `W` takes every `W`-th sample of it, beginning with
    sample `r`, as `DistributedSampler` does. The last samples, which do not fill a batch, are dropped; these are
    different samples in each epoch, as the order changes.

    Args:
        length: number of images.
        global_batch_size: `B`; must be divisible by `world_size` and at most `length`.
        seed, stage: determine the order, together with the epoch.
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
        """Continue in `epoch` after `consumed` samples over all ranks, a multiple of the global batch size."""
        if consumed % self.global_batch_size:
            raise ValueError(f"{consumed} samples are not a whole number of global batches")
        self.set_epoch(epoch)
        self.consumed = consumed

    @property
    def end(self) -> int:
        """Number of samples of an epoch over all ranks, without the dropped ones."""
        return self.steps_per_epoch * self.global_batch_size

    def __len__(self) -> int:
        return (self.end - self.consumed) // self.num_replicas

    def __iter__(self) -> Iterator[SampleKey]:
        order = epoch_order(self.length, self.seed, self.stage, self.epoch)
        for position in range(self.consumed + self.rank, self.end, self.num_replicas):
            yield SampleKey(int(order[position]), self.epoch, position)


class EvalSampler(DistributedSampler[SampleKey]):
    """Every sample exactly once over all ranks, without padding: the ranks' shares may differ by one."""

    def __init__(self, length: int, *, world_size: int, rank: int) -> None:
        super().__init__(cast(Any, range(length)), num_replicas=world_size, rank=rank, shuffle=False)
        self.length = length

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.num_replicas))

    def __iter__(self) -> Iterator[SampleKey]:
        for index in range(self.rank, self.length, self.num_replicas):
            yield SampleKey(index, 0, index)
