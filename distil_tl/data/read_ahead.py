"""Batches that a thread makes before they are asked for."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from distil_tl.data.loader import Batch

END_SECONDS = 5.0  # for the thread to end; what it does takes milliseconds, unless a disk hangs


class ReadAhead(Iterator["Batch"]):
    """The batches of an iterator, made by a thread. It ends when this object is deleted.

    Args:
        ahead: batches that are made before they are asked for, at most.
        prepare: applied to each batch in the thread.
        begin: called first in the thread.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        ahead: int,
        prepare: Callable[[Batch], Batch],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._made: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._ended: BaseException | None = None
        stop = threading.Event()
        thread = threading.Thread(
            target=_make, args=(batches, self._made, self._room, stop, prepare, begin), name="read ahead", daemon=True
        )
        thread.start()
        weakref.finalize(self, _end, thread, self._room, stop)

    def __next__(self) -> Batch:
        if self._ended is not None:
            raise self._ended
        made = self._made.get()
        if isinstance(made, BaseException):
            self._ended = made
            raise made
        self._room.release()
        return made


def _make(
    batches: Iterator[Batch],
    made: queue.SimpleQueue[Batch | BaseException],
    room: threading.Semaphore,
    stop: threading.Event,
    prepare: Callable[[Batch], Batch],
    begin: Callable[[], None],
) -> None:
    """What the thread does. An error, or StopIteration at the end, goes where the batches go."""
    try:
        begin()
        while True:
            room.acquire()
            if stop.is_set():
                return
            made.put(prepare(next(batches)))
    except BaseException as error:
        made.put(error)


def _end(thread: threading.Thread, room: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    room.release()
    thread.join(END_SECONDS)


class PinnedLoader(Iterable["Batch"]):
    """The batches of a loader without loader processes, read by a thread into pinned memory, for a GPU."""

    def __init__(self, loader: Iterable[Batch], device: torch.device, ahead: int) -> None:
        self.loader = loader
        self.device = device
        self.ahead = ahead

    def __iter__(self) -> ReadAhead:
        return ReadAhead(iter(self.loader), self.ahead, pinned, self._begin)

    def _begin(self) -> None:
        torch.cuda.set_device(self.device)  # each thread has its own current device, at first GPU 0
        torch.set_num_threads(1)  # of this thread: copies must not take the CPUs of the others


def pinned(batch: Batch) -> Batch:
    """The same batch with the parts that a GPU needs in pinned memory."""
    return batch.moved(lambda part: part.pin_memory())
