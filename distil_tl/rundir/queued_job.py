"""A Slurm job that was submitted for a run directory, and is still queued when another process trains there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from distil_tl.utils.files import read_json
from distil_tl.utils.log import logger, printable
from distil_tl.utils.processes import run_text

RECORD_FILE = "submitted.json"  # written by launch
ANSWER_S = 10  # seconds for squeue
_ENDED = ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def warn_of_queued_job(run_dir: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Log that a job of this run is waiting or running, if this process does not belong to it."""
    job = _recorded_job(run_dir)
    if job is None or job in _own_jobs(environ):
        return
    state = _state(job)
    if state is not None and state not in _ENDED:
        logger.warning(
            "job %s, which was submitted for this run, is %s: when it starts on another machine, it takes over the "
            "run, and this process ends. If that is not meant, cancel it: distil-tl cancel %s",
            job, state, printable(run_dir),
        )  # fmt: skip


def _recorded_job(run_dir: Path) -> str | None:
    try:
        record = read_json(run_dir / RECORD_FILE)
        return str(record["job_id"]) if record["cluster"] == "slurm" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own_jobs(environ: Mapping[str, str]) -> tuple[str, str]:
    """The id of the job that this process belongs to, and as a task of an array."""
    task = f"{environ.get('SLURM_ARRAY_JOB_ID', '')}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return environ.get("SLURM_JOB_ID", ""), task


def _state(job: str) -> str | None:
    """How squeue calls the state of a job: empty if it does not know the job; None if it does not answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T"]
    try:
        done = run_text(command, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return " ".join(done.stdout.split()[:1]) if done.returncode == 0 else None
