"""What Slurm says about jobs, asked of squeue and scontrol alone: accounting may not be there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
TIMEOUT_S = 60
ACTIVE = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")


class SlurmUnavailableError(Exception):
    """Slurm can't be asked: its commands are not here, or its controller does not answer."""


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue. `id` is that of sbatch, with `_TASK` for a task of an array."""

    id: str
    state: str
    nodes: str
    reason: str

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def lives(self) -> bool:
        """Whether Slurm has it still to run, or runs it."""
        return self.state in WAITING or self.state in ACTIVE


def queued(user: int | None = None) -> dict[str, QueuedJob]:
    """The jobs that Slurm knows of a user, oneself if none is given; those that ended are forgotten after some minutes.

    A task of an array that has begun is there twice, as ARRAY_TASK and by the id of its own that it sees itself.

    Raises:
        SlurmUnavailableError: squeue is not here or does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%N|%r"]
    command.append("--me" if user is None else f"--user={user}")
    found = {}
    for line in _ask(command).splitlines():
        job, own, state, nodes, reason = (line.strip().split("|") + [""] * 5)[:5]
        found[job] = QueuedJob(job, state, nodes, reason)
        if nodes or own != job.partition("_")[0]:  # else it is the array's
            found[own] = found[job]
    return found


def state_of(job_id: str) -> str | None:
    """The state of one job now, None when Slurm has forgotten it.

    Raises:
        SlurmUnavailableError: squeue is not here or does not answer.
    """
    try:
        answer = _ask(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"])
    except SlurmUnavailableError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return answer.split()[0] if answer.split() else None


def requeue(job_id: str) -> None:
    """Put a running job back into the queue; Slurm ends its processes.

    Raises:
        SlurmUnavailableError: scontrol refused.
    """
    _ask(["scontrol", "requeue", job_id])


def cancel(job_ids: Iterable[str]) -> None:
    ids = list(job_ids)
    if ids:
        _ask(["scancel", *ids])


def _ask(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmUnavailableError(f"{command[0]} is not on this machine")
    # What somebody set for reading squeue, such as one partition alone, would hide jobs from us.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError(f"{command[0]} does not answer") from None
    if ran.returncode != 0:
        raise SlurmUnavailableError(f"{command[0]}: {ran.stderr.strip() or f'exit status {ran.returncode}'}")
    return ran.stdout
