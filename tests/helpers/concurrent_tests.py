"""Tests that mostly wait, run at the same time: each in a thread of its own, on two nodes of a Slurm cluster.

A function with the decorator `concurrent` is such a test. pytest collects and reports it as any other. When the first
one of them is due, all that were selected start in background threads, `THREADS` at a time; pytest then waits for the
result of each in turn. So the first one seems to take long, and the others no time. `pytest -rP` prints how long each
really took.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.slurm_cluster import Partition

THREADS = 5
Body = Callable[..., None]


def concurrent(*, first: bool = False) -> Callable[[Body], Callable[..., None]]:
    """Make a test of `body(partition, inputs, tmp_path)`, which runs in a thread.

    Args:
        first: start it before others, because it takes longest.
    """

    def decorate(body: Body) -> Callable[..., None]:
        def test(concurrent_tests: ConcurrentTests) -> None:
            concurrent_tests.result(body)

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        test.body, test.first = body, first  # type: ignore[attr-defined]
        return pytest.mark.slurm(test)

    return decorate


def selected(session: pytest.Session) -> list[Body]:
    """The bodies of the concurrent tests that pytest is about to run, longest first."""
    functions = [getattr(item, "function", None) for item in session.items]
    found = [function for function in functions if hasattr(function, "body")]
    return [function.body for function in sorted(found, key=lambda function: not function.first)]  # type: ignore[union-attr]


class ConcurrentTests:
    """Threads that run the bodies, each thread on a partition of its own, which it restores after each body.

    Args:
        inputs: passed to each body.
        folder: for the temporary folders of the bodies.
    """

    def __init__(self, bodies: Sequence[Body], partitions: Sequence[Partition], inputs: Any, folder: Path) -> None:
        self._inputs, self._folder = inputs, folder
        self._results: dict[Body, Future[str]] = {body: Future() for body in bodies}
        self._waiting: queue.SimpleQueue[Body] = queue.SimpleQueue()
        for body in bodies:
            self._waiting.put(body)
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._work, args=[found], daemon=True) for found in partitions]
        for thread in self._threads:
            thread.start()

    def result(self, body: Body) -> None:
        """Wait until the body has ended. Raises what it raised, and prints when it ran."""
        sys.stdout.write(self._results[body].result())

    def stop(self) -> None:
        """Start no further body. Those that run fail when the cluster is taken down."""
        while not self._waiting.empty():
            self._waiting.get()

    def join(self, timeout: float = 30) -> None:
        for thread in self._threads:
            thread.join(timeout)

    def _work(self, partition: Partition) -> None:
        while True:
            try:
                body = self._waiting.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic() - self._began
            try:
                folder = self._folder / body.__name__
                folder.mkdir()
                body(partition, self._inputs, folder)
                ended = time.monotonic() - self._began
                partition.restore()
            except BaseException as error:
                self._results[body].set_exception(error)
                self._restore_after_failure(partition)
            else:
                self._results[body].set_result(f"ran from {began:.0f} s to {ended:.0f} s on {partition.name}\n")

    def _restore_after_failure(self, partition: Partition) -> None:
        try:
            partition.restore()
        except BaseException as error:  # the next test of this partition will fail, and says what it saw
            sys.stderr.write(f"{partition.name} could not be restored: {error}\n")
