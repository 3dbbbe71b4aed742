"""A DataLoader that limits the wait for its loader processes, and works without them where none can start."""

from __future__ import annotations

import atexit
import errno
import functools
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.queues import Queue
from typing import Any, TypeVar

from torch.utils.data import DataLoader, _utils
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from distil_tl.utils.errors import LoaderError, PreemptedError, loader_fault
from distil_tl.utils.log import logger
from distil_tl.utils.signals import STOP_SIGNALS, stop_requested

T = TypeVar("T")

POLL_SECONDS = 1.0
WAIT_SECONDS = 600.0  # for a batch, where nothing else is given
STOP_SECONDS = 5.0  # for a batch, after a signal that asks the run to stop

SHM_REMEDY = "give it more space (docker run --shm-size=8g, or /dev/shm of the host), or set data.workers=0"
CAUSES = {
    errno.ENOSPC: ("/dev/shm is full", SHM_REMEDY),
    errno.EROFS: ("/dev/shm is mounted read-only", SHM_REMEDY),
    errno.EACCES: ("there is no permission to write to /dev/shm", SHM_REMEDY),
    errno.ENOENT: ("there is no /dev/shm", SHM_REMEDY),
    errno.EMFILE: ("too many files are open", "raise the limit (`ulimit -n`), or set a smaller data.workers"),
    errno.EAGAIN: ("no more processes can be started", "raise the limit (`ulimit -u`), or set a smaller data.workers"),
    errno.ENOMEM: ("there is too little memory", "request more memory, or set a smaller data.workers"),
}


class BoundedLoader(DataLoader[T]):
    """A DataLoader whose iterators limit how long they wait, and then end with an error.

    Attributes:
        seconds: to wait for one batch, at most. Time in which this process is suspended does not count.
    """

    seconds = WAIT_SECONDS

    def __init__(self, *args: Any, num_workers: int = 0, seconds: float = WAIT_SECONDS, **settings: Any) -> None:
        if num_workers:
            atexit.unregister(_kill_workers)
            atexit.register(_kill_workers)
        super().__init__(*args, **{**settings, "num_workers": num_workers, "worker_init_fn": begin_loader_process})
        self.seconds = seconds

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self.num_workers:
            try:
                return _BoundedIterator(self)
            except OSError as error:  # of a lock in /dev/shm, or of a process
                _warn_of_start(*start_problem(error))
                self.num_workers, self.prefetch_factor = 0, None
        return super()._get_iterator()


class _BoundedIterator(_MultiProcessingDataLoaderIter):
    """torch's iterator, of which two steps are guarded: each look for a batch, and the end of the processes."""

    def __init__(self, loader: BoundedLoader[Any]) -> None:
        self._limit = loader.seconds
        self._waited = self._waited_since_stop = 0.0
        self._failed = False
        super().__init__(loader)

    def _try_get_data(self, timeout: float = POLL_SECONDS) -> tuple[bool, Any]:
        """A look for a batch that waits up to `timeout` seconds: (True, batch) or (False, None)."""
        try:
            found: tuple[bool, Any] = super()._try_get_data(  # type: ignore[no-untyped-call]
                min(timeout, POLL_SECONDS)
            )
        except RuntimeError as error:
            killed = [worker for worker in self._workers if (worker.exitcode or 0) < 0]
            if loader_fault(error) is None or not killed:
                raise
            # As torch's handler of SIGCHLD says it, which names the signal.
            number = -(killed[0].exitcode or 0)
            raise RuntimeError(
                f"DataLoader worker (pid {killed[0].pid}) is killed by signal: {signal.strsignal(number)}. "
            ) from None
        if found[0]:
            self._waited = self._waited_since_stop = 0.0
            return found
        # Looks are counted: the clock also runs while the process is suspended.
        self._waited += POLL_SECONDS
        if stop_requested():
            self._waited_since_stop += POLL_SECONDS
        if self._waited_since_stop >= STOP_SECONDS:
            self._failed = True
            raise PreemptedError(
                f"stopped by a signal, while it waited for images for {self._waited:.0f} s: what was not saved before "
                f"is lost. Run the same command to resume from the last checkpoint"
            )
        if self._waited >= self._limit:
            self._failed = True
            raise LoaderError(
                f"no images for {self._limit:g} s, though the loader processes are there: does the disk with the "
                f"images answer? Run the same command to resume, or try data.workers=0"
            )
        return found

    def _shutdown_workers(self) -> None:
        if _utils is None or _utils.python_exit_status is not False or getattr(self, "_shutdown", False):
            return  # Python exits, or this was done
        started, complete = getattr(self, "_workers", []), getattr(self, "_worker_pids_set", False)
        if complete and not self._failed and all(worker.exitcode in (None, 0) for worker in started):
            try:
                super()._shutdown_workers()
                return
            except RuntimeError as error:
                if loader_fault(error) is None:  # else a process was killed now, and is not needed any more
                    raise
        # torch would wait for locks, without a limit, that a process which was killed may hold.
        self._shutdown = True
        if complete:
            _utils.signal_handling._remove_worker_pids(id(self))  # type: ignore[attr-defined]
            self._worker_pids_set = False
        if hasattr(self, "_pin_memory_thread"):
            self._pin_memory_thread_done_event.set()
        for worker in started:
            worker.kill()


def begin_loader_process(worker: int) -> None:
    """Called first in each loader process."""
    # Slurm and terminals send signals to all processes of a job. The rank decides when to stop, and then ends its
    # workers.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(_end_process)  # type: ignore[attr-defined]


def _end_process(error: BaseException, batch: object) -> None:
    """End a loader process that can't send a batch. Python would drop the batch, and the rank would wait for it."""
    with suppress(OSError):
        sys.stderr.write(f"loader process {os.getpid()} can't send a batch: {error}\n")
        sys.stderr.flush()
    os._exit(1)


def _kill_workers() -> None:
    # After an error, the loader's iterator may still exist at exit. multiprocessing would then send SIGTERM to its
    # workers, which ignore it, and wait for them without a timeout.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error when they end
    for worker in multiprocessing.active_children():
        worker.kill()


def start_problem(error: OSError) -> tuple[str, str]:
    """Why loader processes can't be started, and what to do."""
    return CAUSES.get(error.errno or 0, (error.strerror or str(error), "set data.workers=0"))


@functools.cache
def _warn_of_start(cause: str, remedy: str) -> None:
    """Log once for each reason why loader processes can't be started."""
    logger.warning(
        "loader processes can't be started, as %s: images are loaded in this process, which takes much longer. To "
        "correct it, %s",
        cause, remedy,
    )  # fmt: skip
