"""The signals that ask a run to save and stop."""

from __future__ import annotations

import signal

# Ctrl-C, preemption or scancel, the warning before a time limit, a lost connection.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)

_noted: set[str] = set()  # of this process, as signals are


def note_stop(name: str | None) -> None:
    """Note that a signal asked this process to stop; None: that none did."""
    _noted.clear()
    if name is not None:
        _noted.add(name)


def stop_requested() -> bool:
    """Whether a signal was noted: for what waits below the code that decides when to stop."""
    return bool(_noted)
