"""How far ahead loader processes work: bounded in bytes, because batches wait in memory until training takes them."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.shared_memory import has_memory_files
from distil_tl.utils.log import logger
from distil_tl.utils.memory import available_memory

MOST = 8  # batches of one loader process: more would not help against longer delays, and each is an open file
MEMORY_SHARE = 0.25  # of the memory that a rank can still use, for one loader; a stage has two
IN_USE = 2  # batches that training holds while it asks for the next one
SHM = "/dev/shm"


class Prefetch(NamedTuple):
    """Loader processes, and the batches that each of them makes ahead."""

    workers: int
    batches: int


def plan_prefetch(launch: Launch, workers: int, batch_bytes: int, *, limit_mib: int, pinned: bool) -> Prefetch:
    """The loader processes of one loader, and how many batches each of them may make ahead: at least one.

    There are fewer loader processes than wanted, with a warning, if there is not enough memory for a batch of each.

    Args:
        workers: loader processes wanted.
        batch_bytes: of the largest batch.
        limit_mib: `data.prefetch_mib`.
        pinned: batches are copied to pinned memory. No limit of the system applies to it (RLIMIT_MEMLOCK does not
            count what a CUDA driver pins), but it can't be swapped out.
    """
    if not workers:
        return Prefetch(0, 0)
    size = _pinned_size(batch_bytes) if pinned else batch_bytes
    ranks = launch.local_world_size
    memory = _memory_of_loader(launch)
    room = memory // size
    if room < workers:
        _warn(
            f"each loader process needs {_mb(size)} for a batch, and a loader of this rank should use at most "
            f"{_mb(memory)} of the free memory: {_instead(room, workers)}. Request more memory, or set a smaller "
            "data.workers"
        )
    most = MOST
    if not has_memory_files():  # then torch sends each tensor of a batch as an open file in /dev/shm
        most = MOST // 4
        free = free_shared_memory()
        in_shm = room if free is None else max(0, free // (2 * ranks * batch_bytes) - IN_USE)
        if in_shm < min(workers, room):
            _warn(
                f"{SHM} has {_mb(free or 0)} free for two loaders of each rank, and a batch has {_mb(batch_bytes)}: "
                f"{_instead(in_shm, workers)}. Enlarge it, for example with docker run --shm-size=8g, or set a smaller "
                "data.workers"
            )
        room = min(room, in_shm)
    workers = min(workers, room)
    if not workers:
        return Prefetch(0, 0)
    return Prefetch(workers, min(batches_ahead(workers, size, limit_mib), max(1, room // workers), most))


def batches_ahead(workers: int, batch_bytes: int, limit_mib: int) -> int:
    """The batches of each loader process by `data.prefetch_mib` alone."""
    return max(1, min(MOST, (limit_mib << 20) // max(1, workers * batch_bytes)))


def batches_of_thread(launch: Launch, batch_bytes: int, *, limit_mib: int) -> int:
    """How many batches a thread of the training process may load ahead into pinned memory: at least one.

    Args:
        batch_bytes: of the largest batch.
        limit_mib: `data.prefetch_mib`.
    """
    size = _pinned_size(batch_bytes)
    return max(1, min(batches_ahead(1, size, limit_mib), _memory_of_loader(launch) // size))


def _pinned_size(batch_bytes: int) -> int:
    """The bytes that torch's allocator of pinned memory uses: it rounds up to a power of two."""
    return 1 << (batch_bytes - 1).bit_length()


def _memory_of_loader(launch: Launch) -> int:
    """The bytes that batches of one loader of a rank should use at most."""
    return int(MEMORY_SHARE * available_memory() / launch.local_world_size)


def free_shared_memory() -> int | None:
    """Bytes that files in /dev/shm may still use; None where there is no such file system."""
    try:
        status = os.statvfs(SHM)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _instead(room: int, workers: int) -> str:
    if not room:
        return "images are loaded in the training process, which takes much longer"
    return f"{room} instead of {workers} loader processes"


@functools.cache
def _warn(text: str) -> None:
    """Log a warning once, not for each loader."""
    logger.warning("%s", text)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
