"""What a run printed: the files with the output of its job, and the line that says why it failed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distil_tl.utils.files import open_regular

TAIL = 65536  # bytes of a file in which the last line is searched
LONGEST = 400  # characters of a message
NEAR = 30  # lines before the last one in which our own message is preferred
_OWN = re.compile(r"^(distil_tl\.train|distil-tl (train|distil|extend|select)): ")
_START = "Starting with JobEnvironment"  # submitit's first line
# Lines that only repeat that the job ends, and submitit's own.
_NOISE = re.compile(
    r"srun: (launch/slurm: )?(error: .*(Exited with exit code|Terminated|Killed$)|_step_signal: |Terminating )"
    r"|srun: (Job step aborted|First task exited|cluster configuration lacks support)"
    r"|slurmstepd: error: \*\*\* (STEP|JOB) |submitit (INFO|WARNING|ERROR) |launch: job \S+ is |\s*$"
)
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")  # of rank-N.log


def output_files(run_dir: Path, record: Mapping[str, Any] | None) -> dict[int, Path]:
    """The files with the output of a run, by rank: of its job if launch submitted it, else the logs of its ranks."""
    found: dict[int, Path] = {}
    if record is not None:
        pattern = re.compile(rf"{re.escape(str(record['job_id']))}_(\d+)_log\.out")
        for folder in (run_dir / "slurm", run_dir.parent / "slurm"):  # of a run, or of the sweep of a trial
            found |= _numbered(folder, pattern)
    return found or _numbered(run_dir / "logs", re.compile(r"rank-(\d+)\.log"))


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return {}
    matches = [match for name in names if (match := pattern.fullmatch(name)) is not None]
    return {int(match[1]): folder / match[0] for match in sorted(matches, key=lambda match: int(match[1]))}


def last_message(path: Path) -> str | None:
    """The last message in a file, on one line: why a failed run failed. None if there is none."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    lines = [_STAMP.sub("", line) for line in lines]
    starts = [i for i, line in enumerate(lines) if _START in line]
    lines = lines[starts[-1] :] if starts else lines  # of the last start of the job
    last = max((i for i in range(len(lines)) if not _NOISE.match(lines[i])), default=None)
    if last is None:
        return None
    # Libraries may print something after our own message.
    own = [i for i in range(max(0, last - NEAR), last + 1) if _OWN.match(lines[i])]
    if own:
        last = next((i for i in range(own[-1], last) if not lines[i + 1][:1].isspace()), last)
    first = last
    while first > 0 and lines[first][:1].isspace():  # a message of several lines
        first -= 1
    text = _OWN.sub("", " ".join(line.strip() for line in lines[first : last + 1]), count=1)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
