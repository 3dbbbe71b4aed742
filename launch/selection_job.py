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
    attempt = Attempt(folder)

    def select() -> int:
        _begin(attempt, folder)
        began = time.monotonic()
        status = main(arguments)
        _end(attempt, folder, status, time.monotonic() - began)
        return status

    # One command around all of it: `ended_because_of_others` stays as `main` leaves it.
    return run_command(PROGRAM, select)


def _begin(attempt: Attempt, folder: Path) -> None:
    """Raises NoProgressError if the job was restarted several times in a row before it could complete a cell."""
    try:
        attempt.begin(sum(1 for _ in (folder / CELLS).glob("*.json")))
    except NoProgressError:
        raise NoProgressError(
            "the job was restarted several times in a row before it could complete a cell, so it ends here; use a "
            "longer slurm.time, more ranks, or smaller sizes. Submit it again to reset this limit"
        ) from None
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier job; a selection in progress has none


def _end(attempt: Attempt, folder: Path, status: int, seconds: float) -> None:
    """Raises SupersededError if another job took over the folder."""
    attempt.check()
    found = (read_json(folder / "select.json") if status == 0 else None) or {}
    summary = {"status": _STATUS.get(status, "failed"), "best": found.get("best"), "total_seconds": seconds}
    write_json(folder / "summary.json", summary)
    attempt.end()
