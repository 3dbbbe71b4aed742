"""Processes below another one: list them, kill them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """The child processes of a process, and theirs. An empty list where there is no /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(stat.parent.name)] = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def kill_descendants(pid: int) -> None:
    """Kill all processes below a process, also those that are stopped or hang."""
    for one in descendants(pid):
        with suppress(OSError):
            os.kill(one, signal.SIGKILL)


def kill_tree(pid: int) -> None:
    """Kill a process and all processes below it, also those that are stopped or hang. This process comes last."""
    for one in sorted((pid, *descendants(pid)), key=lambda one: one == os.getpid()):
        with suppress(OSError):
            os.kill(one, signal.SIGKILL)
