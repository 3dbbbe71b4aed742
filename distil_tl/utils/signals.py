"""The signals that ask a run to save and stop, and what other commands do at them."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Ctrl-C, preemption or scancel, the warning before a time limit, a lost connection.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)

_noted: set[str] = set()  # of this process, as signals are
_partial: list[Path] = []  # the same: files and folders that are not complete yet


def note_stop(name: str | None) -> None:
    """Note that a signal asked this process to stop; None: that none did."""
    _noted.clear()
    if name is not None:
        _noted.add(name)


def stop_requested() -> bool:
    """Whether a signal was noted: for what waits below the code that decides when to stop."""
    return bool(_noted)


@contextmanager
def removed_on_signal(path: Path) -> Iterator[None]:
    """Remove the file or folder `path` if a signal ends this process within the body. The signal ends it as before.

    A signal that something else handles, or that is ignored, is left to that; so is Ctrl-C, which raises an exception.
    """
    _partial.append(path)
    handled: list[signal.Signals] = []
    try:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        for number in handled:
            signal.signal(number, functools.partial(_remove_and_end, os.getpid()))
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        _partial.remove(path)


def _remove_and_end(owner: int, number: int, frame: object) -> None:
    if os.getpid() == owner:  # and not a process that was forked
        for path in _partial:
            with suppress(OSError):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
