"""Out of memory: a batch goes through the network in smaller parts, instead of ending the run.

The gradient is a sum over images, so the parts of a batch give the same step as the whole, up to rounding. Exceptions
are layers that draw random numbers (dropout) and BatchNorm statistics that train: they depend on the parts.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distil_tl.data.loader import Batch
from distil_tl.data.mixing import Partners
from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.state import StageRecord
from distil_tl.training.stage import Stage
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger

_VARIABLE = "DISTIL_TL_PART_SIZES"  # of the environment, for a process that starts again: sizes by stage, JSON

Result = TypeVar("Result")

# Libraries below torch report a failed allocation as a plain RuntimeError with one of these texts.
_TEXTS = ("out of memory", "STATUS_ALLOC_FAILED", "_ALLOCATION_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failed allocation is the reason for `error`: of torch, of a library below it, or of torch.compile."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(reason, RuntimeError) and any(text in str(reason) for text in _TEXTS):
            return True
        reason = reason.__cause__
    return False


def until_memory_suffices(attempt: Callable[[], Result], recover: Callable[[], None]) -> Result:
    """The result of `attempt`, repeated after each out-of-memory error. `recover` makes it need less memory.

    Raises:
        Exception: another error of `attempt`, or one of `recover`.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        recover()  # after the block: until then the error refers to the tensors of the failed attempt
        free_memory()


def free_memory() -> None:
    """Return the memory of tensors that are no longer in use to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class PartSize:
    """How many images go through a network at once. It is halved when the device runs out of memory.

    Attributes:
        key: of this size in `sizes`.
        what: is computed, for messages.
        sizes: the record of the stage. It has an entry from the first out-of-memory error on, equal on all ranks.
        images: the size on this rank; None as long as memory suffices for whole batches.
        smallest: images of a part that is not halved again.
        note: what changes when a batch is divided, for the message.
    """

    key: str
    what: str
    sizes: dict[str, int] = field(default_factory=dict)
    smallest: int = 1
    note: str = "the results are the same up to rounding"
    images: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.images = self.sizes.get(self.key)

    def split(self, batch: Batch) -> list[Batch]:
        """The parts of a batch, in order; its images are mixed already."""
        if self.images is None or len(batch.images) <= self.images:
            return [batch]
        sizes = part_sizes(len(batch.images), self.images, self.smallest)
        columns = [torch.split(column, sizes) for column in batch[:4]]
        partners: list[Partners | None] = [None] * len(sizes)
        if batch.partners is not None:
            partners = [
                Partners(*parts) for parts in zip(*(torch.split(c, sizes) for c in batch.partners), strict=True)
            ]
        return [
            Batch(images, targets, indices, valid, [], each)
            for images, targets, indices, valid, each in zip(*columns, partners, strict=True)
        ]

    def apply(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """`network(images)`, computed in parts. Halves their size, and starts again, where memory runs out.

        Only for networks whose output for an image does not depend on the others, without gradient.

        Raises:
            UserError: there is too little memory for the smallest part.
        """

        def attempt() -> Tensor:
            if self.images is None or len(images) <= self.images:
                return network(images)
            # Copies, as CUDA graphs write each output to the same memory.
            return torch.cat([network(part).clone() for part in torch.split(images, self.images)])

        return until_memory_suffices(attempt, lambda: self.halve(len(images)))

    def halve(self, batch: int) -> None:
        """Halve the size on this rank, after an out-of-memory error with a batch of `batch` images.

        Raises:
            UserError: the size is the smallest already.
        """
        size = min(batch, self.images or batch)
        if size <= self.smallest:
            raise UserError(
                f"the device has too little memory for {self.what}, even with {_images(size)} at once: use a smaller "
                f"image size or model, precision=bf16, or a device with more free memory",
                one_rank=True,
            )
        self.images = max(self.smallest, -(-size // 2))

    def agree(self, info: DistInfo) -> None:
        """Take the smallest size of all ranks. A collective."""
        self.adopt(-max_over_ranks(info, -self.limit))

    @property
    def limit(self) -> float:
        """`images`, or infinity."""
        return float("inf") if self.images is None else self.images

    def adopt(self, agreed: float) -> None:
        """Take the size that all ranks agreed on. Record it and report it, once for each size."""
        if agreed == float("inf"):
            return
        self.images = int(agreed)
        if self.sizes.get(self.key) != self.images:
            self.sizes[self.key] = self.images
            logger.warning(
                "out of memory in %s: from now on with %s at once on each rank. The global batch is not changed; %s",
                self.what, _images(self.images), self.note,
            )  # fmt: skip


def part_sizes(count: int, size: int, smallest: int) -> list[int]:
    """The sizes of parts of `size` images, `count` in all. A last part below `smallest` is added to the one before."""
    sizes = [min(size, count - start) for start in range(0, count, size)]
    if len(sizes) > 1 and sizes[-1] < smallest:
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return sizes


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def replayed(next_batch: Callable[[], Batch], count: int, taken: list[Batch]) -> Iterator[Batch]:
    """`count` batches: those in `taken`, then new ones, which are added to it. For a step that may be repeated."""
    for i in range(count):
        if i == len(taken):
            taken.append(next_batch())
        yield taken[i]


def training_part_size(stage: Stage, network: nn.Module, record: StageRecord) -> PartSize:
    """The size of the parts of a micro-batch in training, from the record of the stage and from before a restart."""
    norms = any(isinstance(module, _NormBase) for module in network.modules())
    trains_statistics = norms and stage.config.batch_norm == "train"
    earlier = json.loads(os.environ.get(_VARIABLE, "{}")).get(stage.name)
    if earlier is not None:
        record.part_sizes["training"] = min(earlier, record.part_sizes.get("training", earlier))
    note = "the results are the same up to rounding"
    if trains_statistics:
        note = "BatchNorm statistics are those of smaller parts, so the results differ slightly"
    elif any(_drops(module) for module in network.modules()):
        note = "dropout draws other random numbers, so the results differ slightly"
    # BatchNorm needs two values of a channel to train on.
    return PartSize(
        "training", f"the training of stage {stage.name}", record.part_sizes, 2 if trains_statistics else 1, note
    )


def restart_settings(stage: str, part_size: PartSize) -> dict[str, str]:
    """Environment variables that carry a size to the process that starts again."""
    earlier = json.loads(os.environ.get(_VARIABLE, "{}"))
    return {_VARIABLE: json.dumps({**earlier, stage: part_size.images})}


def _drops(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training: dropout, stochastic depth."""
    if module.training and isinstance(rate := getattr(module, "drop_rate", None), float) and rate > 0:
        return True  # of timm: it calls dropout as a function
    name = type(module).__name__.lower() + type(module).__module__.lower()
    if not module.training or not ("drop" in name or "stochastic" in name):
        return False
    return any(float(getattr(module, name, 0) or 0) > 0 for name in ("p", "drop_prob"))


class SavedStatistics:
    """The statistics of normalisation layers at the beginning of a step.

    Args:
        buffers: that a forward pass changes in place; none where statistics are frozen.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = list(buffers)
        self._saved = [buffer.clone() for buffer in buffers]

    def save(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    def restore(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)
