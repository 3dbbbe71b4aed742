"""What is known of a run: the files of its run directory, and its job in Slurm's queue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any

from distil_tl.rundir.lock import FILE as ATTEMPT_FILE
from distil_tl.rundir.lock import can_be_checked, read_attempt
from distil_tl.utils.files import open_regular
from launch.records import find_open_submission, read_json, read_record
from launch.squeue import Queue, QueuedJob, SlurmUnavailableError, read_queue

METRICS_FILE = "metrics.jsonl"
TAIL = 65536  # bytes of metrics.jsonl that are read, as --watch reads the file of every run again and again

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """What the files of a run directory and Slurm's queue say.

    Attributes:
        attempt: the last process that trained.
        record: the job that was last submitted.
        lines: the last lines of metrics.jsonl.
        job: the run's job in Slurm's queue.
        unchecked: why it can't be told whether the run is waiting or running; None if it can.
    """

    run_dir: Path
    summary: Json
    attempt: Json | None
    record: Json | None
    lines: list[dict[str, Any]]
    job: QueuedJob | None
    unchecked: str | None

    @property
    def last(self) -> Json:
        """The last line of metrics.jsonl; empty if there is none."""
        return self.lines[-1] if self.lines else {}


def ask_slurm(run_dirs: Iterable[Path]) -> tuple[Queue | None, str | None]:
    """Slurm's queue of the users who submitted these runs; empty, without a call, if none is a Slurm job.

    Returns:
        The queue, or None and why Slurm does not answer.
    """
    uids = {uid for run_dir in run_dirs for uid in _slurm_users(run_dir)}
    if not uids:
        return Queue(), None
    try:
        return read_queue(uids), None
    except SlurmUnavailableError as error:
        return None, str(error)


def _slurm_users(run_dir: Path) -> Iterator[int]:
    record, attempt, found = read_record(run_dir), _read_attempt(run_dir), find_open_submission(run_dir)
    if found is not None:
        yield found[0].uid
    if record is not None and record["cluster"] == "slurm":
        yield record.get("uid", os.getuid())
    if attempt is not None and attempt["slurm_job_id"] is not None:
        yield attempt.get("uid", os.getuid())


def gather_evidence(run_dir: Path, queue: Mapping[str, QueuedJob] | None) -> Evidence:
    """Read the files of a run, and find its job. `queue` is None if Slurm does not answer."""
    summary = read_json(run_dir / "summary.json") or {}
    attempt, record, unchecked = _read_attempt(run_dir), read_record(run_dir), None
    found = find_open_submission(run_dir)
    if found is not None and found[0].job_id is None:  # it was interrupted, or is just being made
        submission, index = found
        job_id = queue.submissions.get(submission.token) if isinstance(queue, Queue) else None
        if job_id is not None:
            record = submission.record(index, job_id)
        else:
            unchecked = _unlisted(queue, "its submission was interrupted", vars(submission))
    # A later submission was made when an earlier attempt was found to have ended.
    latest = attempt is not None and (record is None or attempt["started_at"] >= record["time"])
    ids = []
    if record is not None and record["cluster"] == "slurm":
        why = _unlisted(queue, f"job {record['job_id']}", record)
        ids += [str(record["job_id"])] if why is None else []
        unchecked = unchecked or why
    if attempt is not None and attempt["slurm_job_id"] is not None and (latest or ids):
        why = _unlisted(queue, f"job {attempt['slurm_job_id']}", attempt)
        ids += [attempt["slurm_job_id"]] if why is None else []
        unchecked = unchecked or (why if latest else None)
    elif attempt is not None and latest and "ended_at" not in attempt and not can_be_checked(attempt):
        unchecked = unchecked or f"can't check its process on {attempt['host']}"
    if record is not None and record["cluster"] != "slurm" and not latest and record.get("host") != gethostname():
        unchecked = unchecked or f"can't check its process on {record.get('host')}"
    jobs = [job for job_id in ids if (job := (queue or {}).get(job_id)) is not None]
    job = next((job for job in jobs if job.is_active), jobs[0] if jobs else None)
    return Evidence(run_dir, summary, attempt, record, read_lines(run_dir / METRICS_FILE, TAIL), job, unchecked)


def _read_attempt(run_dir: Path) -> dict[str, Any] | None:
    """The content of attempt.json. An older one lacks the user, who is then the file's owner."""
    attempt = read_attempt(run_dir / ATTEMPT_FILE)
    if attempt is not None and attempt.get("uid") is None:
        with suppress(OSError):
            attempt["uid"] = (run_dir / ATTEMPT_FILE).stat().st_uid
    return attempt


def _unlisted(queue: Mapping[str, QueuedJob] | None, what: str, made: Json) -> str | None:
    """Why Slurm's queue would not show a job, from its record; None if it would."""
    if queue is None:
        return "Slurm does not answer"
    cluster, uid = made.get("slurm_cluster"), made.get("uid", os.getuid())
    if not isinstance(queue, Queue) or queue.covers(cluster, uid):
        return None
    if cluster is not None and cluster != queue.cluster:
        return f"{what} is of the cluster {cluster}, which can't be asked from here"
    return f"{what} is of {made.get('user', f'user {uid}')}, whose jobs Slurm does not show to you"


def read_lines(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file, or those within its last `tail` bytes."""
    entries = []
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - tail) if tail is not None else 0)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # incomplete: it is being written, or the tail begins within it
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries
