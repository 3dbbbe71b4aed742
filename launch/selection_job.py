"""A selection in a job: `distil-tl select`, with the files by which launch.status knows how it proceeds."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from distil_tl.rundir.lock import Attempt
from distil_tl.selection.outcome import CELLS
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_PREEMPTED, NoProgressError
from distil_tl.utils.files import write_json
from launch.records import read_json

PROGRAM = "distil-tl select"
_STATUS = {0: "completed", EXIT_PREEMPTED: "preempted"}


def select_and_record(arguments: Sequence[str], folder: Path) -> int:
    """Select; rank 0 writes attempt.json and summary.json to the folder of the results. Returns the exit status."""
    from distil_tl.cli.select import main

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return main(arguments)
    attempt, began = Attempt(folder), time.monotonic()
    if refused := run_command(PROGRAM, lambda: _begin(attempt, folder)):
        return refused
    status = main(arguments)
    seconds = time.monotonic() - began
    return run_command(PROGRAM, lambda: _end(attempt, folder, status, seconds)) or status


def _begin(attempt: Attempt, folder: Path) -> None:
    """Raises NoProgressError if the job was restarted several times in a row before it could complete a cell."""
    try:
        attempt.begin(sum(1 for _ in (folder / CELLS).glob("*.json")))
    except NoProgressError:
        raise NoProgressError(
            "the job was restarted several times in a row before it could complete a cell, so it ends here; use a "
            "longer slurm.time, more ranks, or smaller sizes. Submit it again to reset this limit"
        ) from None


def _end(attempt: Attempt, folder: Path, status: int, seconds: float) -> None:
    """Raises SupersededError if another job took over the folder."""
    attempt.check()
    found = (read_json(folder / "select.json") if status == 0 else None) or {}
    summary = {"status": _STATUS.get(status, "failed"), "best": found.get("best"), "total_seconds": seconds}
    write_json(folder / "summary.json", summary)
    attempt.end()
