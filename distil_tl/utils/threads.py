"""The number of CPUs, and calls in separate threads because they may never return."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_NAME = "may never return"  # of the threads that `call_with_timeout` starts


class CallTimeoutError(Exception):
    """A call took too long. Its thread still runs, and is abandoned."""


def call_with_timeout(seconds: float, work: Callable[[], Result], check: Callable[[], None] | None = None) -> Result:
    """Call `work` in a separate daemon thread, with a timeout. Returns or raises what `work` does.

    A signal handler of the main thread runs during the wait, and may raise. Then, as after a timeout, the thread is
    abandoned: it may be blocked in C++ code, which nothing can interrupt.

    Args:
        check: called about once a second; what it raises ends the wait too.

    Raises:
        CallTimeoutError: `work` takes more than `seconds`.
    """
    results, errors = list[Result](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=_NAME, daemon=True)
    thread.start()
    if check is None:
        thread.join(seconds)
    deadline = time.monotonic() + seconds
    while check is not None and thread.is_alive() and time.monotonic() < deadline:
        thread.join(min(1.0, seconds))
        if thread.is_alive():
            check()
    if errors:
        raise errors[0]
    if not results:
        raise CallTimeoutError
    return results[0]


def has_abandoned_threads() -> bool:
    """Whether a call of `call_with_timeout` still runs, in any thread."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def available_cpus() -> int:
    """Number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
