"""From sample keys to batches of uint8 images."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distil_tl.data.config import default_workers
from distil_tl.data.decode import ImageError, decode
from distil_tl.data.index import Index
from distil_tl.data.sampler import SampleKey
from distil_tl.data.transforms import View
from distil_tl.distributed.launch_env import Launch, cpus_of_rank
from distil_tl.utils.log import logger
from distil_tl.utils.rng import keyed_seed
from distil_tl.utils.threads import available_cpus

UNREADABLE = "the file can't be read"


class BatchPlan(NamedTuple):
    """How a global batch is dealt out: `world_size * accumulation * micro == global_batch_size`."""

    micro: int
    accumulation: int


def plan_batches(global_batch_size: int, world_size: int, max_local_batch_size: int | None) -> BatchPlan:
    """The largest micro-batch within the limit that divides a rank's share of the global batch evenly."""
    share = global_batch_size // world_size
    limit = max_local_batch_size or share
    accumulation = next(k for k in range(1, share + 1) if share % k == 0 and share // k <= limit)
    return BatchPlan(share // accumulation, accumulation)


class Batch(NamedTuple):
    """A batch, and what could not be used of it.

    Attributes:
        images: uint8 [N, 3, S, S]; black in the place of a bad one.
        targets: int64 [N].
        indices: int64 [N] into the index, to name an image again.
        valid: bool [N], False in the place of a bad image.
        faults: (index, reason) of each bad image.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    valid: Tensor
    faults: list[tuple[int, str]]


@dataclass(frozen=True)
class Item:
    """One image [3, S, S] of a batch to be, or the reason why there is none."""

    image: Tensor | None
    target: int
    index: int
    fault: str | None


Loader: TypeAlias = "DataLoader[Batch]"


class ImageDataset(Dataset[Item]):
    """Decoded, transformed images; what is random about one is drawn from its key."""

    def __init__(self, index: Index, transform: View, image_size: int, *, seed: int = 0, stage: str = "") -> None:
        self.index = index
        self.image_size = image_size
        self.transform = transform
        self.seed = seed
        self.stage = stage

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are not forked: they share the memory that the index is in."""
        self.index = self.index.to_share()
        return vars(self)

    def __getitem__(self, key: SampleKey) -> Item:
        target = int(self.index.targets[key.image])
        try:
            image = decode(self.index.file(key.image), enough=self.transform.enough)
        except ImageError as error:  # as a value: raised in a worker it would arrive as a wall of text
            return Item(None, target, key.image, error.reason)
        except OSError as error:  # not the image's fault, so that leaving out bad images must not hide it
            where = f", at {self.index.file(key.image)}" if self.index.copy is not None else ""
            return Item(None, target, key.image, f"{UNREADABLE}{where}: {error.strerror or error}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(keyed_seed(self.seed, "augment", self.stage, key.epoch, key.position))
            image = self.transform(image)
        return Item(image, target, key.image, None)

    def collate(self, items: list[Item]) -> Batch:
        """A bad image keeps its place, so that every global batch is the same for any number of ranks."""
        blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        return Batch(
            torch.stack([blank if item.image is None else item.image for item in items]),
            torch.tensor([item.target for item in items]),
            torch.tensor([item.index for item in items]),
            torch.tensor([item.image is not None for item in items]),
            [(item.index, item.fault) for item in items if item.fault is not None],
        )


def choose_workers(launch: Launch, workers: int | None) -> int:
    """Loader processes of this rank: `data.workers`, or by its CPUs."""
    return default_workers(cpus_of_rank(launch)) if workers is None else workers


def warn_of_few_cpus(launch: Launch, workers: int | None) -> None:
    """Say so when the loader will want more CPUs than this rank may use. Slurm gives a task one, if not asked for more.

    Not where the whole machine is small, as there is nothing to be done about that.
    """
    cpus, machine = cpus_of_rank(launch), os.cpu_count() or 1
    if cpus >= (2 if workers is None else workers) or (workers is None and available_cpus() >= machine):
        return
    wanted = "none is left for loader processes" if workers is None else f"data.workers is {workers}"
    logger.warning(
        "each process may use %d of the machine's %d CPUs, and %s: training will wait for images. Ask for more CPUs "
        "with slurm.cpus_per_task (launch.submit) or --cpus-per-task (srun), or set data.workers",
        cpus, machine, wanted,
    )  # fmt: skip


def make_loader(
    dataset: ImageDataset,
    sampler: Sampler[SampleKey] | Sampler[list[SampleKey]],
    *,
    batch_size: int | None,
    workers: int,
    pin_memory: bool,
) -> Loader:
    """A loader over `sampler`, or with `batch_size=None` over batches that are given.

    Workers live on from epoch to epoch; set the sampler's position before iterating.
    """
    if workers:
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)
    loader: Loader = DataLoader(
        dataset,  # type: ignore[arg-type]  # typed by what its items are collated to
        **({"batch_sampler": sampler} if batch_size is None else {"sampler": sampler, "batch_size": batch_size}),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        collate_fn=dataset.collate,
        prefetch_factor=4 if workers else None,
    )
    return loader


def ignore_signals(worker: int) -> None:
    # Slurm and a terminal signal every process of a job; the rank decides when to stop, and ends its workers then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    # After an error the loader's iterator may still be alive at exit, where multiprocessing would send its workers a
    # TERM, which they ignore, and wait for them forever.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would make an error of their end
    for worker in multiprocessing.active_children():
        worker.kill()
