"""The status of a submitted run, from its run directory and from Slurm's queue."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_tl.rundir.lock import FILE as ATTEMPT_FILE
from distil_tl.rundir.lock import is_alive, read_attempt
from distil_tl.training.config import METRICS, rank_by
from distil_tl.utils.args import read_yaml
from distil_tl.utils.data_wait import wait_share
from distil_tl.utils.errors import UserError
from launch.local_job import is_job_alive
from launch.records import read_json, read_record
from launch.squeue import QueuedJob

METRICS_FILE = "metrics.jsonl"
PRUNED_FILE = "pruned.json"  # written by the adaptive search when it ends a trial early
TAIL = 65536  # bytes of metrics.jsonl that are read, as --watch reads the file of every run again and again
QUIET_S = 900  # a run that can't be checked counts as running if it wrote a line within this time
STATES = ("completed", "running", "pending", "requeued", "stopped", "failed", "pruned", "unknown", "missing")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class RunStatus:
    """The status of one run.

    Attributes:
        state: one of STATES.
        progress: fraction of the epochs of all stages, 0 to 1.
        best: the best evaluation so far.
        restarts: how often Slurm restarted the job.
        host: where it runs.
        seconds: total training time.
        data_wait: the share of the last recorded part of training for which it waited for data.
        detail: more about the state, such as why the run failed.
        slurm: how Slurm calls the state of the job, and why.
        left: time until the job's time limit.
        log: the file with its output, of a failed run.
    """

    run_dir: Path
    state: str
    progress: float | None = None
    best: dict[str, Any] | None = None
    stage: str | None = None
    epoch: int | None = None
    step: int | None = None
    job_id: str | None = None
    restarts: int = 0
    host: str | None = None
    seconds: float | None = None
    data_wait: float | None = None
    detail: str | None = None
    slurm: str | None = None
    left: str | None = None
    log: Path | None = None


@dataclass(frozen=True)
class _Evidence:
    """What the files of a run directory and Slurm's queue say. `queue_known` is False if Slurm did not answer."""

    run_dir: Path
    summary: Json
    attempt: Json | None
    record: Json | None
    last: Json
    job: QueuedJob | None
    queue_known: bool


def read_status(run_dir: Path, queue: Mapping[str, QueuedJob] | None) -> RunStatus:
    """The status of the run in `run_dir`. `queue` is None if Slurm does not answer."""
    summary = read_json(run_dir / "summary.json") or {}
    attempt = read_attempt(run_dir / ATTEMPT_FILE)
    record = read_record(run_dir)
    lines = _read_lines(run_dir / METRICS_FILE, TAIL)
    last = lines[-1] if lines else {}
    job = _find_job(record, attempt, queue)
    state, detail = _decide(_Evidence(run_dir, summary, attempt, record, last, job, queue is not None))
    best = summary.get("best")
    host = (attempt or {}).get("host") if state == "running" else None
    return RunStatus(
        run_dir,
        state,
        progress=1.0 if state == "completed" else _progress(run_dir, last),
        best=best if isinstance(best, dict) else _best(run_dir, lines),
        stage=last.get("stage"),
        epoch=last.get("epoch"),
        step=last.get("step"),
        job_id=_job_id(job, record, attempt),
        restarts=(attempt or {}).get("restarts", 0),
        host=job.nodes if job and job.nodes else host,
        seconds=summary.get("total_seconds"),
        data_wait=wait_share(next((line for line in reversed(lines) if line.get("split") == "train"), {})),
        detail=detail,
        slurm=None if job is None else f"{job.state}{f', {job.reason}' if job.reason not in ('', 'None') else ''}",
        left=job.left if job is not None and job.state == "RUNNING" and job.left[:1].isdigit() else None,
    )


def _job_id(job: QueuedJob | None, record: Json | None, attempt: Json | None) -> str | None:
    if record is None or (job is not None and job.is_active):
        return job.id if job is not None else (attempt or {}).get("slurm_job_id")
    return str(record["job_id"])


def _decide(seen: _Evidence) -> tuple[str, str | None]:
    """The state, and a detail about it."""
    status, job, attempt, record = seen.summary.get("status"), seen.job, seen.attempt, seen.record
    if status == "completed" and not (job is not None and job.is_waiting):  # it waits if it was extended by a stage
        return "completed", None
    if (seen.run_dir / PRUNED_FILE).exists():
        return "pruned", None
    if job is not None and job.is_active:
        if job.is_waiting:
            has_run = attempt is not None and (record is None or attempt.get("started_at", "") >= record["time"])
            return ("requeued" if has_run else "pending"), (job.reason if job.reason != "None" else None)
        return "running", None
    if _is_training_here(attempt) or is_job_alive(record):
        return "running", None
    in_slurm = _is_slurm_job(attempt, record)
    unchecked_slurm = in_slurm and not seen.queue_known
    if status == "preempted" and not unchecked_slurm:  # otherwise it may be in Slurm's queue again
        return "stopped", "preempted and saved; submit it again to resume"
    if status == "failed":
        return "failed", None
    if attempt is None and record is None:
        return "missing", None
    host = None if in_slurm else _other_host(attempt, record)
    if unchecked_slurm or host is not None:
        written = get_number(seen.last, "time")
        recent = written is not None and time.time() - written < QUIET_S
        reason = "Slurm does not answer" if host is None else f"can't check its process on {host}"
        return ("running" if recent else "unknown"), reason
    if job is not None and job.state == "CANCELLED":
        return "stopped", "cancelled"
    reason = f"job {job.id} is {job.state}" if job is not None else "its job is no longer in the queue"
    return "failed", f"exited without writing a status ({reason})"


def _is_training_here(attempt: Json | None) -> bool:
    return attempt is not None and "ended_at" not in attempt and "process" in attempt and is_alive(attempt)


def _is_slurm_job(attempt: Json | None, record: Json | None) -> bool:
    if (attempt or {}).get("slurm_job_id") is not None:
        return True
    return record is not None and record["cluster"] == "slurm"


def _other_host(attempt: Json | None, record: Json | None) -> str | None:
    """The other machine where a run outside Slurm may still be running; None if there is none."""
    if attempt is not None and "ended_at" in attempt:
        return None
    host = (attempt or record or {}).get("host", socket.gethostname())
    return None if host == socket.gethostname() else str(host)


def _find_job(record: Json | None, attempt: Json | None, queue: Mapping[str, QueuedJob] | None) -> QueuedJob | None:
    if queue is None:
        return None
    by_record = queue.get(str(record["job_id"])) if record is not None else None
    return by_record or queue.get(str((attempt or {}).get("slurm_job_id")))


def _progress(run_dir: Path, last: Json) -> float | None:
    """The fraction of epochs done, over all stages; None if the files don't tell."""
    try:
        stages = read_yaml(run_dir / "config.yaml")["stages"]
        epochs = {name: int(stage["epochs"]) for name, stage in stages.items()}
        names = list(epochs)
        before = sum(epochs[name] for name in names[: names.index(last["stage"])])
        done = last["epoch"] if last["split"] == "val" else last["epoch"] - 1
        fraction: float = (before + done) / max(1, sum(epochs.values()))
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return fraction


def _best(run_dir: Path, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best evaluation: of the last `lines` of metrics.jsonl and the best until then, which a checkpoint holds."""
    saved = (read_json(run_dir / "checkpoints/last/state.json") or {}).get("run")
    if not isinstance(saved, dict):  # without a checkpoint, read the whole file
        lines = _read_lines(run_dir / METRICS_FILE)
    before = saved.get("best") if isinstance(saved, dict) else None
    evaluations = [line for line in lines if line.get("split") == "val"]
    if isinstance(before, dict):
        evaluations.append(before)
    metric = metric_of(run_dir)
    scored = [line for line in evaluations if get_number(line, metric) is not None]
    return min(scored, key=lambda line: rank_by(metric, {**line, "loss": loss_of(line)}), default=None)


def metric_of(run_dir: Path) -> str:
    """What chooses the best epoch of a run. Only its line of config.yaml is read."""
    try:
        found = re.search(r"^metric: (\w+)$", (run_dir / "config.yaml").read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        found = None
    return found[1] if found and found[1] in METRICS else "top1"


def get_number(line: Json, key: str) -> float | None:
    """The value of a key if it is a number."""
    value = line.get(key)
    return value if isinstance(value, (int, float)) else None


def loss_of(evaluation: Json) -> float:
    """The loss, for ranking: infinity if it is missing."""
    loss = get_number(evaluation, "loss")
    return math.inf if loss is None else loss


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """All evaluations in a run's metrics.jsonl, in order."""
    return [line for line in _read_lines(run_dir / METRICS_FILE) if line.get("split") == "val"]


def _read_lines(path: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file, or those within its last `tail` bytes."""
    entries = []
    try:
        with path.open("rb") as file:
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
