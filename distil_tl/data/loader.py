"""Dataset and loader: from sample keys to batches of uint8 images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distil_tl.data.config import default_workers
from distil_tl.data.decode import ImageError, decode
from distil_tl.data.index import Index
from distil_tl.data.loader_processes import WAIT_SECONDS, BoundedLoader
from distil_tl.data.mixing import Partners
from distil_tl.data.pillow import Intensity
from distil_tl.data.sampler import SampleKey
from distil_tl.data.transforms import ImageTransform
from distil_tl.distributed.launch_env import Launch, cpus_of_rank
from distil_tl.distributed.shared_memory import SharedArrays
from distil_tl.utils.log import logger
from distil_tl.utils.rng import keyed_seed
from distil_tl.utils.threads import available_cpus

UNREADABLE = "the file can't be read"  # the beginning of the reason


class BatchPlan(NamedTuple):
    """The division of a global batch: `world_size * accumulation * micro == global_batch_size`."""

    micro: int
    accumulation: int


def plan_batches(global_batch_size: int, world_size: int, max_local_batch_size: int | None) -> BatchPlan:
    """The largest micro-batch within the limit that divides a rank's share of the global batch evenly."""
    share = global_batch_size // world_size
    limit = max_local_batch_size or share
    accumulation = next(k for k in range(1, share + 1) if share % k == 0 and share // k <= limit)
    return BatchPlan(share // accumulation, accumulation)


class Batch(NamedTuple):
    """A batch, in which some images may be unusable.

    Attributes:
        images: uint8 [N, 3, S, S]; black in place of a bad image.
        targets: int64 [N].
        indices: int64 [N], positions of the images in the index.
        valid: bool [N], False for a bad image.
        faults: (index, reason) of each bad image.
        partners: what the images are mixed with; `images` then has more rows, of partners that are not among the N.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    valid: Tensor
    faults: list[tuple[int, str]]
    partners: Partners | None = None

    @property
    def all_indices(self) -> Tensor:
        """Positions in the index of the images and their partners; most are both."""
        return self.indices if self.partners is None else torch.cat([self.indices, self.partners.indices])

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `move` applied to the parts that a device needs; the indices stay."""
        partners = self.partners
        if partners is not None:
            needed = {name: move(part) for name, part in partners._asdict().items() if name != "indices"}
            partners = partners._replace(**needed)
        images, targets, valid = move(self.images), move(self.targets), move(self.valid)
        return self._replace(images=images, targets=targets, valid=valid, partners=partners)


@dataclass(frozen=True)
class Item:
    """One image [3, S, S] of a batch, or the reason why it cannot be used."""

    image: Tensor | None
    target: int
    index: int
    bad_reason: str | None


_TENSORS = ("images", "targets", "indices", "valid")
_PARTNER = "partner "  # begins the names of those of `Partners`


def _reduced(batch: Batch) -> tuple[Any, ...]:
    """How a loader process sends a batch to its rank: in anonymous memory, as one open file.

    torch would write a file in /dev/shm for each tensor. Docker limits /dev/shm to 64 MB, and what no longer fits there
    ends a loader process with a bus error. Anonymous memory has no such limit. Where there is none, or the open file
    can't be sent, the batch is written through the pipe between the processes, which takes longer.
    """
    arrays = {name: getattr(batch, name).numpy() for name in _TENSORS}
    if batch.partners is not None:
        arrays |= {f"{_PARTNER}{name}": tensor.numpy() for name, tensor in batch.partners._asdict().items()}
    faults, shared = batch.faults, SharedArrays.copied(arrays)
    if shared is None:
        return _received, (arrays, faults)
    try:
        rebuild, parts = shared.__reduce__()
    except OSError:  # no folder for the socket through which open files are sent, or too many of these
        return _received, (arrays, faults)
    return _received_shared, (rebuild, parts, faults)


def _received(arrays: Mapping[str, np.ndarray], faults: list[tuple[int, str]]) -> Batch:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    of_partners = {
        name: tensors.pop(f"{_PARTNER}{name}") for name in Partners._fields if f"{_PARTNER}{name}" in tensors
    }
    return Batch(**tensors, faults=faults, partners=Partners(**of_partners) if of_partners else None)


def _received_shared(
    rebuild: Callable[..., SharedArrays], parts: tuple[Any, ...], faults: list[tuple[int, str]]
) -> Batch:
    return _received(rebuild(*parts), faults)


ForkingPickler.register(Batch, _reduced)

Loader: TypeAlias = "DataLoader[Batch]"


class ImageDataset(Dataset[Item]):
    """Decoded and transformed images. The augmentation of an image is a function of its key."""

    def __init__(
        self,
        index: Index,
        transform: ImageTransform,
        image_size: int,
        *,
        seed: int = 0,
        stage: str = "",
        intensity: Intensity = "dtype",
    ) -> None:
        self.index = index
        self.image_size = image_size
        self.transform = transform
        self.seed = seed
        self.stage = stage
        self.intensity = intensity

    def __len__(self) -> int:
        return len(self.index)

    @property
    def bytes_per_image(self) -> int:
        """Of a batch."""
        return 3 * self.image_size**2 + 17  # with the target, the position in the index and the validity

    def __getstate__(self) -> dict[str, Any]:
        """The state for loader processes that are not forked; the index is put into shared memory for them."""
        self.index = self.index.to_share()
        return vars(self)

    def __getitem__(self, key: SampleKey) -> Item:
        target = int(self.index.targets[key.image])
        try:
            path, min_side = self.index.local_path(key.image), self.transform.min_side
            image = decode(path, min_side=min_side, intensity=self.intensity)
        except ImageError as error:  # returned: an exception in a worker would be printed with a long traceback
            return Item(None, target, key.image, error.reason)
        except OSError as error:  # an error of the file system, not of the image: it must not be skipped
            where = f", at {self.index.local_path(key.image)}" if self.index.copy is not None else ""
            return Item(None, target, key.image, f"{UNREADABLE}{where}: {error.strerror or error}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(keyed_seed(self.seed, "augment", self.stage, key.epoch, key.position))
            image = self.transform(image)
        return Item(image, target, key.image, None)

    def collate(self, items: list[Item]) -> Batch:
        return collate(items, self.image_size)


def collate(items: list[Item], image_size: int) -> Batch:
    """The batch of these items. A bad image keeps its position: batches do not depend on the number of ranks."""
    blank = torch.zeros(3, image_size, image_size, dtype=torch.uint8)
    return Batch(
        torch.stack([blank if item.image is None else item.image for item in items]),
        torch.tensor([item.target for item in items]),
        torch.tensor([item.index for item in items]),
        torch.tensor([item.image is not None for item in items]),
        [(item.index, item.bad_reason) for item in items if item.bad_reason is not None],
    )


def choose_workers(launch: Launch, workers: int | None) -> int:
    """Number of loader processes of this rank: `workers`, or a number that follows from its CPUs."""
    return default_workers(cpus_of_rank(launch)) if workers is None else workers


def warn_of_few_cpus(launch: Launch, workers: int | None) -> None:
    """Warn if the loader needs more CPUs than this rank may use. By default, Slurm gives a task only one.

    No warning if this process may use the whole machine, because then nothing can be changed.
    """
    cpus, machine = cpus_of_rank(launch), os.cpu_count() or 1
    if cpus >= (2 if workers is None else workers) or (workers is None and available_cpus() >= machine):
        return
    need = "none is left for loader processes" if workers is None else f"data.workers is {workers}"
    logger.warning(
        "each process may use %d of the machine's %d CPUs, and %s: training will wait for images. Request more CPUs "
        "with slurm.cpus_per_task (launch.submit) or --cpus-per-task (srun), or set data.workers",
        cpus, machine, need,
    )  # fmt: skip


def make_loader(
    dataset: ImageDataset,
    batches: Sampler[list[SampleKey]],
    *,
    workers: int,
    ahead: int,
    pin_memory: bool,
    seconds: float = WAIT_SECONDS,
) -> Loader:
    """A loader of batches, of which each loader process makes up to `ahead` before they are asked for.

    Args:
        seconds: to wait for one batch, at most.
    """
    loader: Loader = BoundedLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        seconds=seconds,
        collate_fn=dataset.collate,
        prefetch_factor=ahead if workers else None,
        generator=torch.Generator(),  # else a loader that starts draws from the generator of the training
    )
    return loader
