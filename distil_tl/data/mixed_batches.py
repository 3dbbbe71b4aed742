"""Batches for mixup and CutMix: each image with its partner, and mixing them on the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from distil_tl.data.loader import Batch, ImageDataset, Item, collate
from distil_tl.data.mixing import UNMIXED, Mixing, Partners
from distil_tl.data.sampler import NO_PARTNER, SampleKey, TrainSampler
from distil_tl.utils.rng import keyed_seed


def with_partners(sampler: TrainSampler, keys: Sequence[SampleKey]) -> list[SampleKey]:
    """The keys of some samples of an epoch, which name their partners, and those of partners not among them."""
    epoch, positions = keys[0].epoch, [key.position for key in keys]
    found = [key._replace(partner=sampler.partner(key.position)) for key in keys]
    return found + [sampler.key(epoch, position) for position in _missing(sampler, positions)]


def _missing(sampler: TrainSampler, positions: Sequence[int]) -> list[int]:
    """The positions of the partners that are not among `positions`."""
    there = set(positions)
    return [partner for partner in map(sampler.partner, positions) if partner not in there]


class MixedBatches(Sampler[list[SampleKey]]):
    """The micro-batches of this rank, in which partners are together where possible; else both have the partner's view.

    A partner is half a global batch away. So it is on the same rank if the number of ranks divides half of the global
    batch size. Then the images of a rank are in the order of their pairs.

    Args:
        micro: images of a micro-batch.
        mixing: of the stage.
    """

    def __init__(self, sampler: TrainSampler, micro: int, mixing: Mixing) -> None:
        self.sampler = sampler
        self.micro = micro
        self.mixing = mixing

    def __len__(self) -> int:
        return len(self.sampler) // self.micro

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys, sampler = iter(self.sampler), self.sampler
        share = sampler.global_batch_size // sampler.num_replicas
        while own := list(itertools.islice(keys, share)):
            mixes = own[0].epoch < self.mixing.epochs
            for part in self._parts(own):
                yield with_partners(sampler, part) if mixes else part

    @property
    def largest(self) -> int:
        """Images of the largest batch, with the partners that are not among its own images."""
        first = list(range(self.sampler.rank, self.sampler.global_batch_size, self.sampler.num_replicas))
        return max(len(part) + len(_missing(self.sampler, part)) for part in self._parts(first))

    def _parts(self, own: list[Any]) -> list[list[Any]]:
        """What this rank has of a global batch, in micro-batches."""
        size, ranks, half = self.sampler.global_batch_size, self.sampler.num_replicas, len(own) // 2
        if size % 2 == 0 and size // 2 % ranks == 0:
            own = [own[i + j] for i in range(half) for j in (0, half)]
        return [own[i : i + self.micro] for i in range(0, len(own), self.micro)]


class MixedDataset(ImageDataset):
    """Decoded and transformed images, and what they are mixed with. A partner has the view of its own position."""

    mixing: Mixing

    @property
    def bytes_per_image(self) -> int:
        return super().bytes_per_image + 44  # with a row of `Partners`

    def __getitems__(self, keys: list[SampleKey]) -> list[tuple[SampleKey, Item]]:
        return [(key, self[key]) for key in keys]

    def collate(self, items: list[Any]) -> Batch:
        """The batch of the samples that name a partner, with the images of all; of all samples where none does.

        An image is not mixed if it or its partner can't be used.
        """
        batch = collate([item for _, item in items], self.image_size)
        own = [key for key, _ in items if key.partner != NO_PARTNER]
        if not own:
            return batch
        row_at = {key.position: row for row, (key, _) in enumerate(items)}
        rows = torch.tensor([row_at[key.partner] for key in own])
        usable = (batch.valid[: len(own)] & batch.valid[rows]).tolist()
        drawn = [self._draw(key) if mixes else UNMIXED for key, mixes in zip(own, usable, strict=True)]
        partners = Partners(
            rows=rows,
            targets=batch.targets[rows],
            indices=batch.indices[rows],
            shares=torch.tensor([each.share for each in drawn]),
            boxes=torch.tensor([each.box for each in drawn], dtype=torch.int32),
        )
        targets, indices, valid = (column[: len(own)] for column in (batch.targets, batch.indices, batch.valid))
        return Batch(batch.images, targets, indices, valid, batch.faults, partners)

    def _draw(self, key: SampleKey) -> Any:
        return self.mixing.draw(keyed_seed(self.seed, "mix", self.stage, key.epoch, key.position), self.image_size)


def mix(batch: Batch, mixing: Mixing | None) -> Batch:
    """The same batch with its images mixed; without `mixing`, or in epochs without it, as it is.

    CutMix copies pixels, so the images stay uint8. Mixup makes them float32, still from 0 to 255: normalisation is
    linear, so mixing before it is the same up to rounding.
    """
    partners = batch.partners
    if partners is None or mixing is None:
        return batch
    own, others = batch.images[: len(partners.rows)], batch.images[partners.rows]
    boxed = torch.zeros_like(partners.shares, dtype=torch.bool)
    if mixing.cutmix > 0:
        top, left, bottom, right = (side[:, None, None] for side in partners.boxes.unbind(1))
        y, x = (torch.arange(side, device=own.device) for side in own.shape[2:])
        inside = (y[:, None] >= top) & (y[:, None] < bottom) & (x >= left) & (x < right)
        own, boxed = torch.where(inside[:, None], others, own), inside.flatten(1).any(1)
    if mixing.mixup > 0:
        weights = partners.shares.masked_fill(boxed, 1)[:, None, None, None]
        own = own.float() * weights + others.float() * (1 - weights)
    return batch._replace(images=own)


def dominant(targets: Tensor, partners: Partners | None) -> Tensor:
    """The targets of the larger shares, for training metrics: int64 [N]."""
    return targets if partners is None else torch.where(partners.shares >= 0.5, targets, partners.targets)
