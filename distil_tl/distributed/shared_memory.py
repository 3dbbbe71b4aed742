"""Arrays in memory that no folder knows, and that processes of a machine can hold together."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where among the bytes of all arrays one of them lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def places_of(arrays: Mapping[str, np.ndarray]) -> list[Place]:
    places, end = list[Place](), 0
    for name, array in arrays.items():
        start = -(-end // 64) * 64  # aligned for every dtype
        end = start + array.nbytes
        places.append(Place(name, array.dtype.str, array.shape, start, end))
    return places


def size_of(places: Sequence[Place]) -> int:
    """Bytes, at least 1."""
    return max([1, *(place.end for place in places)])


def fill(memory: np.ndarray, places: Sequence[Place], arrays: Mapping[str, np.ndarray]) -> None:
    """Copy `arrays` to their places in `memory`, uint8 [size]."""
    for place in places:
        memory[place.start : place.end] = np.ascontiguousarray(arrays[place.name]).reshape(-1).view(np.uint8)


def views(memory: np.ndarray, places: Sequence[Place]) -> dict[str, np.ndarray]:
    """The arrays in `memory`, uint8 [size], by name."""
    return {place.name: memory[place.start : place.end].view(place.dtype).reshape(place.shape) for place in places}


class SharedArrays(Mapping[str, np.ndarray]):
    """Arrays by name in a file in memory. What a process writes to becomes its own, and the others don't see it.

    A process that it is pickled for as it starts gets the same memory, and no copy.
    """

    def __init__(self, file: int, places: Sequence[Place]) -> None:
        """`file` is a descriptor, closed with the last reference to this."""
        self.file = file
        self.places = places
        self._arrays = views(mapped(file, size_of(places), mmap.ACCESS_COPY), places)

    @classmethod
    def copied(cls, arrays: Mapping[str, np.ndarray]) -> SharedArrays | None:
        """A copy of `arrays` to share; None where there is no memory for that."""
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
        return _received, (DupFd(self.file), self.places)

    def __del__(self) -> None:
        os.close(self.file)


def _received(file: Any, places: Sequence[Place]) -> SharedArrays:
    return SharedArrays(file.detach(), places)


def new_memory(size: int) -> int | None:
    """A file of `size` bytes in memory alone; None where there is none to be had."""
    try:
        made = os.memfd_create("distil_tl")
    except (AttributeError, OSError):  # not Linux
        return None
    try:
        os.posix_fallocate(made, 0, size)  # what is missing shows now, and not as a bus error later
    except OSError:
        os.close(made)
        return None
    return made


def mapped(file: int, size: int, access: int) -> np.ndarray:
    """The bytes of a file, uint8 [size]."""
    return np.frombuffer(mmap.mmap(file, size, access=access), np.uint8)
