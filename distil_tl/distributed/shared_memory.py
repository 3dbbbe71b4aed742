"""Arrays in anonymous memory (memfd) that processes of one machine can share."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """The byte range of one array in the memory of all of them, with its dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def places_of(arrays: Mapping[str, np.ndarray]) -> list[Place]:
    """A layout of the arrays, each aligned to 64 bytes."""
    places, end = list[Place](), 0
    for name, array in arrays.items():
        start = -(-end // 64) * 64  # enough for every dtype
        end = start + array.nbytes
        places.append(Place(name, array.dtype.str, array.shape, start, end))
    return places


def size_of(places: Sequence[Place]) -> int:
    """Number of bytes, at least 1."""
    return max([1, *(place.end for place in places)])


def fill(memory: np.ndarray, places: Sequence[Place], arrays: Mapping[str, np.ndarray]) -> None:
    """Copy `arrays` to their places in `memory`, uint8 [size]."""
    for place in places:
        memory[place.start : place.end] = np.ascontiguousarray(arrays[place.name]).reshape(-1).view(np.uint8)


def views(memory: np.ndarray, places: Sequence[Place]) -> dict[str, np.ndarray]:
    """The arrays in `memory`, uint8 [size], by name."""
    return {place.name: memory[place.start : place.end].view(place.dtype).reshape(place.shape) for place in places}


class SharedArrays(Mapping[str, np.ndarray]):
    """Arrays by name in shared memory. Writes are private to a process (copy on write).

    Pickled to start a process, it gives that process the same memory, not a copy.
    """

    file: int | None = None  # None until it is taken over: a signal may end the process just before

    def __init__(self, file: int, places: Sequence[Place]) -> None:
        """`file` is a descriptor, which this object closes when it is deleted."""
        self.file = file
        self.places = places
        self._arrays = views(mapped(file, size_of(places), mmap.ACCESS_COPY), places)

    @classmethod
    def copied(cls, arrays: Mapping[str, np.ndarray]) -> SharedArrays | None:
        """A copy of `arrays` to share; None if there is no memory for it."""
        places = places_of(arrays)
        file = new_memory(size_of(places))
        if file is None:
            return None
        fill(mapped(file, size_of(places), mmap.ACCESS_WRITE), places, arrays)
        return cls(file, places)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.file is not None
        return _received, (DupFd(self.file), self.places)

    def __del__(self) -> None:
        if self.file is not None:
            os.close(self.file)


def _received(file: Any, places: Sequence[Place]) -> SharedArrays:
    return SharedArrays(file.detach(), places)


def new_memory(size: int) -> int | None:
    """A descriptor of `size` bytes of anonymous memory; None if the system has no memfd or not enough memory."""
    try:
        made = _memory_file()
    except (AttributeError, OSError):  # not Linux
        return None
    try:
        os.posix_fallocate(made, 0, size)  # allocate now: missing memory would be a bus error later
    except OSError:
        os.close(made)
        return None
    return made


def _memory_file() -> int:
    """A descriptor of an empty file in anonymous memory."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("distil_tl")
    libc = ctypes.CDLL(None, use_errno=True)  # Python built for an older system, as conda's, lacks the function
    made: int = libc.memfd_create(b"distil_tl", 1)  # closed in programs that are started
    if made < 0:
        raise OSError(ctypes.get_errno(), "memfd_create")
    return made


@functools.cache
def has_memory_files() -> bool:
    """Whether the system has files in anonymous memory."""
    file = new_memory(1)
    if file is not None:
        os.close(file)
    return file is not None


def mapped(file: int, size: int, access: int) -> np.ndarray:
    """The bytes of a file, mapped: uint8 [size]."""
    return np.frombuffer(mmap.mmap(file, size, access=access), np.uint8)
