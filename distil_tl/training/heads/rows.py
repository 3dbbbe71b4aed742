"""The features of a split as rows of a matrix, in blocks that are divided among the ranks.

Each block is computed as a whole by one rank, and the sums of the blocks are added in their order, in float64. So a sum
over all rows is the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distil_tl.data.feature_cache import FeatureDataset
from distil_tl.data.sampler import SampleKey
from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.memory import is_out_of_memory
from distil_tl.utils.errors import UserError
from distil_tl.utils.memory import available_memory

TOO_LITTLE_MEMORY = "a rank has too little memory"
SMALLEST_BLOCK, MAX_BLOCKS = 256, 16  # rows of a block, except the last one; and blocks of a split
AT_ONCE = 1 << 22  # numbers that the ranks exchange in one collective
PART = 2048  # rows that are computed at once

Weigh = Callable[[Tensor, Tensor], Tensor]  # targets and positions of images, int64 [N]: their weights, float64 [N]


class Part(NamedTuple):
    """Some usable images.

    Attributes:
        features: float32 [N, D].
        targets: int64 [N].
        weights: float64 [N].
    """

    features: Tensor
    targets: Tensor
    weights: Tensor

    def one_hot(self, classes: int) -> Tensor:
        """float64 [N, C]."""
        return F.one_hot(self.targets, classes).double()


class Standard(NamedTuple):
    """Mean and standard deviation of each feature, float64 [D]. A feature that is constant has deviation 1."""

    mean: Tensor
    deviation: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Standardised float32 [N, D]."""
        return ((features - self.mean.float()) / self.deviation.float()).contiguous()

    def folded_into(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """A linear layer of standardised features, as one of features as they are, float64."""
        raw = weight.double() / self.deviation
        return {"weight": raw, "bias": bias.double() - raw @ self.mean}


class Group(NamedTuple):
    """The ranks that fit a head together, and how they agree to stop."""

    info: DistInfo
    agreement: Agreement

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on all ranks, so that ranks with other processors take the same decisions. A collective."""
        if self.info.store is not None:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, src=0)
        return tensor


def _of_ranks(info: DistInfo, own: Tensor, count: int) -> Iterator[Tensor]:
    """The tensors of the first `count` ranks, one after another where all at once need much memory. A collective."""
    if info.store is None:
        yield own
    elif own.numel() * info.world_size <= AT_ONCE:
        each = [torch.empty_like(own) for _ in range(info.world_size)]
        dist.all_gather(each, own)
        yield from each[:count]
    else:
        for rank in range(count):
            found = own if rank == info.rank else torch.empty_like(own)
            dist.broadcast(found, src=rank)
            yield found


class Rows:
    """The usable images of a dataset. Blocks of this rank are kept on the device, others are read when needed.

    Args:
        weigh: the weights of images; all 1 if it is None.
        standard: with which the features are standardised; as they are if it is None.
    """

    def __init__(
        self, group: Group, dataset: FeatureDataset, weigh: Weigh | None = None, standard: Standard | None = None
    ) -> None:
        self.group, self.dataset = group, dataset
        self._weigh, self._standard = weigh, standard
        count = len(dataset)
        size = max(SMALLEST_BLOCK, -(-count // MAX_BLOCKS))
        self.blocks = [range(first, min(first + size, count)) for first in range(0, count, size)]
        self._kept: dict[int, Part] = {}

    @property
    def width(self) -> int:
        return int(self.dataset.example(1).shape[1])

    def standardized(self, standard: Standard) -> Rows:
        return Rows(self.group, self.dataset, self._weigh, standard)

    def load_own(self) -> bool:
        """Read the blocks of this rank. Returns whether the memory of all ranks suffices. A collective."""
        info = self.group.info
        own = range(info.rank, len(self.blocks), info.world_size)

        def load() -> None:
            self._kept = {number: self.block(number) for number in own}

        count = sum(len(self.blocks[number]) for number in own)
        if self._unless_out_of_memory(load, count, info.launch.local_world_size):
            return True
        self._kept = {}
        return False

    def everything(self, *, on_all: bool = True) -> Part | None:
        """All usable images, on every rank or on rank 0 alone; without images on the others. A collective.

        Returns:
            None, on all ranks, if the memory of one does not suffice.
        """
        info, found = self.group.info, list[Part]()
        count = len(self.dataset) if on_all or info.is_main else 0

        def load() -> None:
            features, targets, weights = self._empty(count)
            first = 0
            for part in (self.block(number) for number in range(len(self.blocks) if count else 0)):
                last = first + len(part.targets)
                features[first:last], targets[first:last], weights[first:last] = part
                first = last
            found.append(Part(features[:first], targets[:first], weights[:first]))

        loading = info.launch.local_world_size if on_all else 1
        return found[0] if self._unless_out_of_memory(load, count, loading) else None

    def _empty(self, count: int) -> Part:
        """Room for so many images."""
        device = self.group.info.device
        features = torch.empty(count, self.width, device=device)
        return Part(
            features,
            torch.empty(count, dtype=torch.int64, device=device),
            torch.empty(count, dtype=torch.float64, device=device),
        )

    def _unless_out_of_memory(self, load: Callable[[], None], count: int, loading: int) -> bool:
        """Whether no rank runs out of memory in `load`.

        On a CPU the system would end a process that takes more than there is, so the size is compared before.

        Args:
            count: images that this rank reads.
            loading: ranks of a node that read as many.
        """
        info, failed = self.group.info, False
        if info.device.type == "cpu":
            too_many = 4 * count * self.width > available_memory() / loading
            if max_over_ranks(info, float(too_many)):
                return False
        try:
            load()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        return not max_over_ranks(info, float(failed))

    def block(self, number: int) -> Part:
        """A block, standardised, of usable images only."""
        if number in self._kept:
            return self._kept[number]
        device = self.group.info.device
        batch = self.dataset.__getitems__([SampleKey(i, 0, i) for i in self.blocks[number]])
        valid = batch.valid
        features = batch.images.float()[valid].to(device)
        targets = batch.targets[valid].to(device)
        if self._standard is not None:
            features = self._standard.apply(features)
        if self._weigh is None:
            weights = torch.ones(len(targets), dtype=torch.float64, device=device)
        else:
            weights = self._weigh(targets, batch.indices[valid]).double()
        return Part(features, targets, weights)

    def parts(self, number: int) -> Iterator[Part]:
        """The parts of a block that are computed one after another."""
        whole = self.block(number)
        for first in range(0, len(whole.targets), PART):
            yield Part(*(column[first : first + PART] for column in whole))

    def total(self, shape: tuple[int, ...], of: Callable[[Part], Tensor]) -> Tensor:
        """The sum of `of` over all parts, float64 [shape], on all ranks alike. A collective.

        Raises:
            UserError: the memory of a rank does not suffice. On all ranks alike.
            AllRanksStopError: on all ranks alike.
        """
        info = self.group.info
        self.group.agreement.raise_if_stopping()
        sums = torch.zeros(math.prod(shape) + 1, dtype=torch.float64, device=info.device)  # the last one: out of memory
        for first in range(0, len(self.blocks), info.world_size):
            own = torch.zeros_like(sums)
            if first + info.rank < len(self.blocks):
                self._add_block(own, first + info.rank, of)
            for found in _of_ranks(info, own, min(info.world_size, len(self.blocks) - first)):
                sums += found
        if sums[-1] > 0:
            raise UserError(f"{TOO_LITTLE_MEMORY} to fit this kind of head to these features: use a linear head")
        return sums[:-1].view(shape)

    def _add_block(self, own: Tensor, number: int, of: Callable[[Part], Tensor]) -> None:
        """Add `of` the parts of a block to all but the last number; that counts a lack of memory."""
        try:
            for part in self.parts(number):
                own[:-1] += of(part).flatten()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            own.zero_()
            own[-1] = 1.0
