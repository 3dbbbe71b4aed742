"""Commands of the system, and the processes below another one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def run_text(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints, in UTF-8; other bytes, as in the names of jobs, are replaced.

    Args:
        options: of `subprocess.run`.
    """
    return subprocess.run(
        command, **{"capture_output": True, "encoding": "utf-8", "errors": "replace", "check": False, **options}
    )


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
