"""Loader processes that are killed, that hang, that can't send a batch, or that can't be started."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distil_tl.data import loader_processes
from distil_tl.data.loader_processes import BoundedLoader
from distil_tl.utils.errors import LoaderError, PreemptedError, loader_fault
from distil_tl.utils.log import setup_console
from distil_tl.utils.signals import note_stop
from tests.helpers.ranks import run_ranks, train
from tests.helpers.shared_memory import LINUX

pytestmark = LINUX


class Numbers:
    """The numbers 0 to 7; a loader process that comes to 3 does something else."""

    def __init__(self, at_three: Any = None) -> None:
        self.at_three = at_three

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        if i == 3 and self.at_three is not None and multiprocessing.parent_process() is not None:
            return self.at_three()
        return i


def loader(at_three: Any = None, *, workers: int = 1, seconds: float = 60) -> BoundedLoader[list[Any]]:
    numbers: Any = Numbers(at_three)
    return BoundedLoader[list[Any]](
        numbers, batch_size=2, num_workers=workers, collate_fn=list, seconds=seconds, multiprocessing_context="fork"
    )


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loader_processes, "POLL_SECONDS", 0.05)
    loader_processes._warn_of_start.cache_clear()
    before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)
    note_stop(None)
    left = set(multiprocessing.active_children()) - before
    for process in left:
        process.join(30)  # a killed one takes a moment
    assert not set(multiprocessing.active_children()) - before


def test_batches_come_in_order() -> None:
    assert list(loader(workers=2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "a loader process was killed, probably for lack of memory"),
        (signal.SIGBUS, "ended with a bus error, probably because /dev/shm or memory is full"),
        (signal.SIGSEGV, "a loader process crashed (Segmentation fault)"),
    ],
)
def test_a_killed_process_ends_the_wait(number: int, said: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        list(loader(lambda: os.kill(os.getpid(), number)))
    assert said in str(loader_fault(caught.value))


def test_a_batch_that_cannot_be_sent_ends_the_wait() -> None:
    """Python would print a traceback, drop the batch, and wait for it."""
    with pytest.raises(RuntimeError) as caught:
        list(loader(lambda: lambda: 0))
    assert "a loader process" in str(loader_fault(caught.value))


def test_a_wait_has_a_limit() -> None:
    with pytest.raises(LoaderError, match="no images for 0.5 s.* does the disk with the images answer"):
        list(loader(lambda: time.sleep(1000), workers=2, seconds=0.5))


def test_a_signal_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_processes, "STOP_SECONDS", 0.2)
    batches = iter(loader(lambda: time.sleep(1000)))
    assert next(batches) == [0, 1]
    note_stop("SIGTERM")
    with pytest.raises(PreemptedError, match="while it waited for images"):
        next(batches)
    del batches


@pytest.mark.parametrize("possible", [0, 3, 9, 12])  # locks: 0 not even a queue, 12 the first of two processes
@pytest.mark.parametrize(
    ("number", "said"), [(errno.EROFS, "/dev/shm is mounted read-only"), (errno.ENOSPC, "/dev/shm is full")]
)
def test_without_room_for_locks_this_process_loads(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], possible: int, number: int, said: str
) -> None:
    made, original = iter(range(possible)), multiprocessing.synchronize._multiprocessing.SemLock  # type: ignore[attr-defined]

    def lock(*args: Any) -> Any:
        if next(made, None) is None:
            raise OSError(number, os.strerror(number))
        return original(*args)

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", lock)  # type: ignore[attr-defined]
    setup_console(True)
    here = loader(workers=2)
    assert list(here) == list(here) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    output, errors = capfd.readouterr()
    assert output.count(f"loader processes can't be started, as {said}") == 1
    assert errors == ""


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    setup_console(True)
    assert len(list(loader(workers=2))) == 4
    assert "no more processes can be started" in capsys.readouterr().out


def train_with_shm(options: str, args: list[str]) -> int:
    """Train, as the body of a rank, with another /dev/shm for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS
    assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # private, and all below
    flags = 1 if options == "ro" else 0
    assert libc.mount(b"none", b"/dev/shm", b"tmpfs", flags, b"" if flags else options.encode()) == 0
    return train(args)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system in a namespace of its own")
@pytest.mark.parametrize("options", ["size=64k", "ro"])
def test_a_run_with_hardly_any_shared_memory(small: list[str], tmp_path: Path, options: str) -> None:
    args = [*small, "data.workers=2", "stages.head.epochs=0", "stages.full.epochs=1", f"run_dir={tmp_path}/run"]
    assert run_ranks(1, train_with_shm, options, args) == [0]
