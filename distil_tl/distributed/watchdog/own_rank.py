"""The process of a rank, as its watchdog sees it. Only the standard library."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress


class OwnRank:
    """The process of the watchdog's rank.

    Attributes:
        descriptor: a pidfd, readable when the process is gone; None on an older kernel.
        stopped_for: seconds.
        leaving: how it leaves, if it has said that it does.
        leaves_by: the time at which it must have left.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.descriptor: int | None = None
        with suppress(OSError, AttributeError):
            self.descriptor = os.pidfd_open(pid)
        self._is_parent = os.getppid() == pid
        self._sees_proc = os.path.islink("/proc/self") and os.readlink("/proc/self") == str(os.getpid())  # noqa: PTH114, PTH115
        self.stopped_for = 0.0
        self.leaving: str | None = None
        self.leaves_by = float("inf")

    def is_gone(self) -> bool:
        if self.descriptor is not None:
            return bool(select.select([self.descriptor], [], [], 0)[0])
        return (self._is_parent and os.getppid() != self.pid) or not self._exists()

    def observe(self, passed: float) -> None:
        """Count for how long it has been stopped; `passed` are the seconds since the last call.

        Only a stopped process is frozen. One that waits for a disk (D) or is stopped by a debugger (t) is not.
        """
        self.stopped_for = self.stopped_for + passed if self._state() == "T" else 0.0

    def kill(self, number: int) -> None:
        """Send it a signal."""
        with suppress(OSError):
            if self.descriptor is not None:
                signal.pidfd_send_signal(self.descriptor, number)
            elif not self.is_gone():
                os.kill(self.pid, number)

    def _state(self) -> str:
        """The letter in /proc; ? if that is not known."""
        if not self._sees_proc:  # not mounted, or that of other processes
            return "?"
        try:
            with open(f"/proc/{self.pid}/stat", encoding="utf-8") as file:  # noqa: PTH123
                return file.read().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "?"

    def _exists(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True
