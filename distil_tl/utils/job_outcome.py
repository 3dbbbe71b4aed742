"""The file in which a run says how it ends, for the batch script around it: launch/job.sh.

Slurm's exit status of a job step does not say it: when one process ends, Slurm ends the others, and returns the highest
status. A run that was killed says nothing. The script notes that a run was killed, or started after it was preempted.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

VARIABLE = "DISTIL_TL_OUTCOME"  # of the environment: the file, with a line for each note of each start of the job
SAVED = "saved"  # a checkpoint
PREEMPTED = "preempted"  # requeue the job
FAILED = "failed"  # by itself: it would fail again
REFUSED = "refused"  # wrong input
MOST_PREEMPTED = 20  # times in a row without a checkpoint


def note(word: str) -> None:
    """Add a line, if the job has such a file. It does not matter much if it can't be written."""
    if VARIABLE in os.environ and not (word == SAVED and notes()[-1:] == [SAVED]):
        with suppress(OSError), Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(word + "\n")


def notes() -> list[str]:
    """All lines, of earlier starts of the job too."""
    try:
        return Path(os.environ[VARIABLE]).read_text(encoding="utf-8").split()
    except (KeyError, OSError):
        return []


def is_stuck() -> bool:
    """Whether the run was stopped many times without a checkpoint, perhaps because another rank can't start."""
    since = notes()
    while SAVED in since:
        del since[: since.index(SAVED) + 1]
    return since.count(PREEMPTED) >= MOST_PREEMPTED
