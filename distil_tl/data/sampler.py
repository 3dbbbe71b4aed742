"""Order of the samples: a function of (seed, stage, epoch), divided among any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from distil_tl.utils.rng import keyed_seed

NO_PARTNER = -1


class SampleKey(NamedTuple):
    """A sample to load, with the epoch and position that its augmentation depends on.

    The sampler yields such keys instead of indices, so that loader processes need no other state. `partner` is the
    position of the sample that it is mixed with.
    """

    image: int
    epoch: int
    position: int
    partner: int = NO_PARTNER


def epoch_order(length: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """The permutation of `range(length)` for one epoch, int64 [length]."""
    generator = torch.Generator().manual_seed(keyed_seed(seed, "order", stage, epoch))
    return torch.randperm(length, generator=generator).numpy()


def members_of_classes(targets: np.ndarray) -> list[np.ndarray]:
    """The images of each class that occurs, in order, int64 each."""
    order = np.argsort(targets, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(targets[order])) + 1)


def balanced_order(members: Sequence[np.ndarray], seed: int, stage: str, epoch: int) -> np.ndarray:
    """As many samples as there are images, with each class equally often (up to one), int64 [length].

    A class takes its share by going through its images again and again, in a new order each time.

    Args:
        members: as of `members_of_classes`.
    """
    generator = torch.Generator().manual_seed(keyed_seed(seed, "balanced order", stage, epoch))
    length = sum(map(len, members))
    shares = np.full(len(members), length // len(members))
    shares[torch.randperm(len(members), generator=generator).numpy()[: length % len(members)]] += 1
    drawn = []
    for images, share in zip(members, shares.tolist(), strict=True):
        rounds = [torch.randperm(len(images), generator=generator) for _ in range(-(-share // len(images)))]
        drawn += [images[torch.cat(rounds)[:share].numpy()]] if rounds else []
    found = np.concatenate(drawn)
    order: np.ndarray = found[torch.randperm(len(found), generator=generator).numpy()]
    return order


class TrainSampler(DistributedSampler[SampleKey]):
    """The training order of a stage, from a position to its end; global batches do not depend on the world size.

    Global batch `s` is `order[s * B : (s + 1) * B]`. Rank `r` of `W` takes every `W`-th sample of it, beginning with
    sample `r`, as `DistributedSampler` does. The last samples, which do not fill a batch, are dropped; these are
    different samples in each epoch, as the order changes. So no batch has samples of two epochs.

    Args:
        length: number of images.
        global_batch_size: `B`; must be divisible by `world_size` and at most `length`.
        seed, stage: determine the order, together with the epoch.
        epochs: of the stage.
        targets: classes of the images, int [length]: each class comes equally often, and an epoch has some images
            several times and others not at all. None: an epoch has each image once.
    """

    # Nine parameters: all that the order depends on.
    def __init__(
        self,
        length: int,
        *,
        global_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        stage: str,
        epochs: int,
        targets: np.ndarray | None = None,
    ) -> None:
        if global_batch_size % world_size or global_batch_size > length:
            raise ValueError(f"global batch {global_batch_size}, world {world_size}, {length} images")
        super().__init__(cast(Any, range(length)), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.length = length
        self.stage = stage
        self.epochs = epochs
        self._members = None if targets is None else members_of_classes(targets)
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = length // global_batch_size
        self.consumed = 0
        self._order: tuple[int, np.ndarray] | None = None  # of an epoch

    def set_position(self, epoch: int, consumed: int = 0) -> None:
        """Begin in `epoch` after `consumed` samples over all ranks, a multiple of the global batch size."""
        if consumed % self.global_batch_size:
            raise ValueError(f"{consumed} samples are not a whole number of global batches")
        self.set_epoch(epoch)
        self.consumed = consumed

    @property
    def is_balanced(self) -> bool:
        """Whether each class is drawn equally often; else an epoch has each image at most once."""
        return self._members is not None

    @property
    def end(self) -> int:
        """Number of samples of an epoch over all ranks, without the dropped ones."""
        return self.steps_per_epoch * self.global_batch_size

    def __len__(self) -> int:
        return ((self.epochs - self.epoch) * self.end - self.consumed) // self.num_replicas

    def __iter__(self) -> Iterator[SampleKey]:
        consumed = self.consumed
        for epoch in range(self.epoch, self.epochs):
            yield from self.keys(epoch, consumed)
            consumed = 0

    def keys(self, epoch: int, consumed: int = 0) -> Iterator[SampleKey]:
        """The samples of one epoch, after `consumed` samples over all ranks."""
        order = self._order_of(epoch)
        for position in range(consumed + self.rank, self.end, self.num_replicas):
            yield SampleKey(int(order[position]), epoch, position)

    def key(self, epoch: int, position: int) -> SampleKey:
        """The sample at a position of an epoch, of this rank or another one."""
        return SampleKey(int(self._order_of(epoch)[position]), epoch, position)

    def partner(self, position: int) -> int:
        """The position of the sample that another one is mixed with: half a global batch further, in the same one."""
        size = self.global_batch_size
        return position - position % size + (position % size + size // 2) % size

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            if self._members is None:
                order = epoch_order(self.length, self.seed, self.stage, epoch)
            else:
                order = balanced_order(self._members, self.seed, self.stage, epoch)
            self._order = epoch, order
        return self._order[1]


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


def in_batches(sampler: Sampler[SampleKey], batch_size: int) -> Sampler[list[SampleKey]]:
    """The samples of a sampler in batches; only the last one may be smaller."""
    batches: Any = BatchSampler(cast(Any, sampler), batch_size, drop_last=False)  # which is typed for indices
    return cast(Sampler[list[SampleKey]], batches)


class EvalBatches(Sampler[list[SampleKey]]):
    """The batches of an evaluation, several times in a row. None has samples of two passes.

    Args:
        batch_size: at most, of this rank.

    Attributes:
        passes: how often every sample comes.
    """

    def __init__(self, sampler: EvalSampler, batch_size: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.passes = 1

    @property
    def turns(self) -> int:
        """Batches of rank 0 in one pass; no rank has more."""
        return math.ceil(math.ceil(self.sampler.length / self.sampler.num_replicas) / self.batch_size)

    @property
    def per_pass(self) -> int:
        """Batches of this rank in one pass."""
        return math.ceil(len(self.sampler) / self.batch_size)

    def __len__(self) -> int:
        return self.passes * self.per_pass

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for _ in range(self.passes):
            yield from in_batches(self.sampler, self.batch_size)
