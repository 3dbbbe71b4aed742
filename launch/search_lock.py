"""One search process at a time in the folder of a search."""

from __future__ import annotations

from pathlib import Path

from distil_tl.rundir.lock import is_alive, read_attempt
from distil_tl.utils.errors import UserError

LOCK_FILE = "search.json"  # names the process that searches in the folder


def refuse_other_search(folder: Path) -> None:
    """Check that no process of this machine searches in `folder`. A process on another machine can't be seen from here:
    it ends when it finds that this one has taken the lock.

    Raises:
        UserError: names the process.
    """
    other = read_attempt(folder / LOCK_FILE)
    if other is not None and "ended_at" not in other and is_alive(other):
        raise UserError(
            f"{folder} is in use: process {other['pid']} of this machine has been searching there since "
            f"{other['started_at']}. Wait until it ends, run `kill {other['pid']}`, or choose another --dir"
        )
