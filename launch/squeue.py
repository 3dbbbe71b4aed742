"""Slurm's state of jobs, from squeue and scontrol only, as a cluster may have no accounting (sacct)."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from distil_tl.utils.processes import run_text

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ACTIVE = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")
TIMEOUT_S = 60  # of one command
TOKEN = re.compile(r"distil_tl-[0-9a-f]{16}")  # of a submission: in the comment of its jobs, and in their script's name


class SlurmUnavailableError(Exception):
    """A Slurm command is not installed, failed or timed out."""


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue.

    Attributes:
        id: the job id that sbatch printed, followed by `_TASK` for a task of an array.
        nodes: node list, empty while the job waits.
        reason: why the job waits or how it ended, in Slurm's words.
        left: time until its limit, such as 1-02:30:00.
    """

    id: str
    state: str
    nodes: str
    reason: str
    left: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_active(self) -> bool:
        """Whether the job is waiting or running."""
        return self.state in WAITING or self.state in ACTIVE


class Queue(dict[str, QueuedJob]):
    """Jobs by id, of some users of a cluster.

    Attributes:
        cluster: Slurm's name of the cluster; None if it is not known.
        uids: the users whose jobs it has; None if it has those of all who are asked about.
        submissions: the job id, or that of the array, by the token of the submission.
    """

    def __init__(self, cluster: str | None = None, uids: Collection[int] | None = None) -> None:
        super().__init__()
        self.cluster, self.uids = cluster, uids
        self.submissions: dict[str, str] = {}

    def covers(self, cluster: str | None, uid: int) -> bool:
        """Whether a job of that cluster (None: not recorded) and user would be listed."""
        known = cluster is None or (self.cluster is not None and cluster.lower() == self.cluster.lower())
        return known and (self.uids is None or uid in self.uids)


def read_queue(uids: Collection[int] = ()) -> Queue:
    """All jobs of some users (the current one if none are given). Slurm forgets ended jobs after some minutes.

    A started task of an array has two keys: ARRAY_TASK, and its own job id, which is in its environment.

    Raises:
        SlurmUnavailableError: squeue is not installed or does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%N|%r|%L|%k|%o"]
    me, others = os.getuid(), {uid for uid in uids if uid != os.getuid() and _has_name(uid)}
    command.append(f"--user={','.join(map(str, sorted({me, *others})))}" if others else "--me")
    lines = _run(command).splitlines()
    cluster, private = read_cluster()
    queue = Queue(cluster, {me} if private and me != 0 else {me, *others})
    for line in lines:
        job, own_id, state, nodes, reason, left = (line.strip().split("|") + [""] * 6)[:6]
        queue[job] = QueuedJob(job, state, nodes, reason, left)
        if nodes or own_id != job.partition("_")[0]:  # otherwise it is the id of the whole array
            queue[own_id] = queue[job]
        for token in TOKEN.findall(line):
            queue.submissions[token] = job.partition("_")[0]
    return queue


def _has_name(uid: int) -> bool:
    """Whether squeue knows the user: it refuses to list anything if it is asked about one that it does not."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def read_cluster() -> tuple[str | None, bool]:
    """Slurm's name of the cluster (None if it is not known), and whether users see only their own jobs."""
    try:
        text = _run(["scontrol", "show", "config"])
    except SlurmUnavailableError:
        return None, False
    values = dict(re.findall(r"^(\w+)\s*= *(.*?)\s*$", text, re.MULTILINE))
    return values.get("ClusterName"), "jobs" in values.get("PrivateData", "").split(",")


def job_state(job_id: str) -> tuple[str | None, int]:
    """The current state of one job, None if Slurm no longer knows it; and how often Slurm has restarted it.

    Raises:
        SlurmUnavailableError: squeue is not installed or does not answer.
    """
    try:
        words = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--Format=State,RestartCnt"]).split()
    except SlurmUnavailableError as error:
        if "Invalid job id" in str(error):
            return None, 0
        raise
    return (words[0] if words else None), (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0)


def read_ended(job_ids: Iterable[str]) -> dict[str, str]:
    """How jobs ended that Slurm has forgotten, by id, such as `FAILED, exit status 2`. Empty without accounting."""
    ids = list(job_ids)
    if not ids:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--allusers", "--format=JobID,State,ExitCode"]
    try:
        lines = _run([*command, f"--jobs={','.join(ids)}"]).splitlines()
    except SlurmUnavailableError:
        return {}
    ended = {}
    for line in lines:
        job, state, codes = (line.strip().split("|") + [""] * 3)[:3]
        status, _, number = codes.partition(":")
        how = f", signal {number}" if number not in ("", "0") else f", exit status {status}"
        ended[job] = state + (how if state == "FAILED" else "")
    return ended


def requeue_job(job_id: str) -> None:
    """Put a running job back into the queue; Slurm ends its processes.

    Raises:
        SlurmUnavailableError: scontrol failed.
    """
    _run(["scontrol", "requeue", job_id])


def cancel_jobs(job_ids: Iterable[str]) -> None:
    """Cancel jobs.

    Raises:
        SlurmUnavailableError: scancel failed.
    """
    ids = list(job_ids)
    if ids:
        _run(["scancel", *ids])


def list_nodes(format: str) -> str:
    """The nodes of all partitions, in a format of sinfo.

    Raises:
        SlurmUnavailableError: sinfo is not installed or does not answer.
    """
    return _run(["sinfo", "--noheader", "--exact", f"--format={format}"])


def max_array_size() -> int | None:
    """The largest number of tasks of an array; None if Slurm does not tell."""
    try:
        text = _run(["scontrol", "show", "config"])
    except SlurmUnavailableError:
        return None
    found = re.search(r"^MaxArraySize\s*= *(\d+)", text, re.MULTILINE)
    return int(found[1]) if found is not None else None


def set_array_parallelism(array: str, tasks: int) -> None:
    """Change how many tasks of a queued array may run at once.

    Raises:
        SlurmUnavailableError: scontrol failed.
    """
    try:
        _run(["scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={tasks}"])
    except SlurmUnavailableError as error:
        if "No error" not in str(error):  # for the tasks that have not finished: `5_0-1: Job has already finished`
            raise


def is_installed() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None and shutil.which("scontrol") is not None


def _run(command: list[str]) -> str:
    """The standard output of a Slurm command."""
    if shutil.which(command[0]) is None:
        raise SlurmUnavailableError(f"{command[0]} is not on this machine")
    # A user's SQUEUE_* settings, such as SQUEUE_PARTITION, would hide jobs.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = run_text(command, timeout=TIMEOUT_S, env=environ)
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError(f"{command[0]} does not answer") from None
    if done.returncode != 0:
        lines = dict.fromkeys(line.strip() for line in done.stderr.splitlines() if line.strip())
        why = "; ".join(line.removeprefix(f"{command[0]}: ") for line in lines) or f"exit status {done.returncode}"
        raise SlurmUnavailableError(f"{command[0]}: {why}")
    return done.stdout
