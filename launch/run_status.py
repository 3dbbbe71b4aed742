"""How a submitted training stands: from its run directory first, and from Slurm where it can be asked."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_tl.rundir.lock import FILE as ATTEMPT
from distil_tl.rundir.lock import is_alive, read_attempt
from launch.records import read_record
from launch.squeue import QueuedJob

METRICS = "metrics.jsonl"
TAIL = 65536  # bytes of it that are read: a watched sweep has many, and they grow for days
SLURM = "Slurm"
QUIET_S = 900  # a run that has written nothing for so long is not taken for a running one on its files' word alone
STATES = ("completed", "running", "pending", "requeued", "stopped", "failed", "pruned", "unknown", "missing")


@dataclass(frozen=True)
class Standing:
    """One run.

    Attributes:
        progress: 0 to 1, in epochs.
        detail: of what there is no other word for, such as why it failed.
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
    detail: str | None = None


def stand(run_dir: Path, queue: Mapping[str, QueuedJob] | None) -> Standing:
    """How the run in `run_dir` stands; `queue` is None when Slurm can't be asked."""
    summary = _json(run_dir / "summary.json")
    attempt = read_attempt(run_dir / ATTEMPT)
    record = read_record(run_dir)
    lines = _lines(run_dir / METRICS, TAIL)
    last = lines[-1] if lines else {}
    job = _job(record, attempt, queue)
    state, detail = _state(run_dir, summary, attempt, record, last, job, asked=queue is not None)
    told = (summary or {}).get("best")
    best = told if isinstance(told, dict) else _best(run_dir, lines)
    return Standing(
        run_dir,
        state,
        progress=1.0 if state == "completed" else _progress(run_dir, last),
        best=best,
        stage=last.get("stage"),
        epoch=last.get("epoch"),
        step=last.get("step"),
        job_id=str(record["job_id"]) if record else (attempt or {}).get("slurm_job_id"),
        restarts=(attempt or {}).get("restarts", 0),
        host=(job.nodes if job and job.nodes else None)
        or ((attempt or {}).get("host") if state == "running" else None),
        seconds=(summary or {}).get("total_seconds"),
        detail=detail,
    )


def _state(
    run_dir: Path,
    summary: Mapping[str, Any] | None,
    attempt: Mapping[str, Any] | None,
    record: Mapping[str, Any] | None,
    last: Mapping[str, Any],
    job: QueuedJob | None,
    *,
    asked: bool,
) -> tuple[str, str | None]:
    status = (summary or {}).get("status")
    if status == "completed" and not (job is not None and job.waits):  # with a stage more, say
        return "completed", None
    if (run_dir / "pruned.json").exists():
        return "pruned", None
    if job is not None and job.lives:
        if job.waits:
            again = attempt is not None and (record is None or attempt.get("started_at", "") >= record["time"])
            return ("requeued" if again else "pending"), (job.reason if job.reason != "None" else None)
        return "running", None
    if _lives_here(attempt) or is_starting(record):
        return "running", None
    silent = _not_asked(attempt, record, asked=asked)
    if status == "preempted" and silent != SLURM:  # which may have it in the queue again
        return "stopped", "asked to stop, and saved; submitting it again goes on"
    if status == "failed":
        return "failed", None
    if attempt is None and record is None:
        return "missing", None
    if silent is not None:
        written = number(last, "time")
        recent = written is not None and time.time() - written < QUIET_S
        return ("running" if recent else "unknown"), f"{silent} can't be asked"
    if job is not None and job.state == "CANCELLED":
        return "stopped", "cancelled"
    ended = f"job {job.id} is {job.state}" if job is not None else "its job is gone"
    return "failed", f"it ended without a word ({ended})"


def _lives_here(attempt: Mapping[str, Any] | None) -> bool:
    return attempt is not None and "ended_at" not in attempt and "process" in attempt and is_alive(attempt)


def is_starting(record: Mapping[str, Any] | None) -> bool:
    """Whether the job of a record is one of this machine, and lives, whatever has come of it yet."""
    if record is None or record["cluster"] != "local" or record.get("host") != socket.gethostname():
        return False
    try:  # the number may be another process's by now
        return b"submitit.local" in Path(f"/proc/{record['job_id']}/cmdline").read_bytes()
    except OSError:
        return False


def _not_asked(attempt: Mapping[str, Any] | None, record: Mapping[str, Any] | None, *, asked: bool) -> str | None:
    """Who would know whether a run goes on, if that is somebody who was not asked."""
    job = (attempt or {}).get("slurm_job_id")
    if job is not None or (record is not None and record["cluster"] == "slurm"):
        return None if asked else SLURM
    if attempt is not None and "ended_at" in attempt:
        return None
    host = (attempt or record or {}).get("host", socket.gethostname())
    return None if host == socket.gethostname() else str(host)


def _job(
    record: Mapping[str, Any] | None, attempt: Mapping[str, Any] | None, queue: Mapping[str, QueuedJob] | None
) -> QueuedJob | None:
    if queue is None:
        return None
    by_record = queue.get(str(record["job_id"])) if record is not None else None
    return by_record or queue.get(str((attempt or {}).get("slurm_job_id")))


def _progress(run_dir: Path, last: Mapping[str, Any]) -> float | None:
    """Epochs begun and done, over all stages; None where the files don't say."""
    from distil_tl.utils.args import read_yaml
    from distil_tl.utils.errors import UserError

    try:
        stages = read_yaml(run_dir / "config.yaml", ())["stages"]
        epochs = {name: int(stage["epochs"]) for name, stage in stages.items()}
        names = list(epochs)
        before = sum(epochs[name] for name in names[: names.index(last["stage"])])
        done = last["epoch"] if last["split"] == "val" else last["epoch"] - 1
        share: float = (before + done) / max(1, sum(epochs.values()))
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return share


def _best(run_dir: Path, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of all evaluations, by the last `lines` of metrics.jsonl and the checkpoint, which was written after each one."""
    saved = (_json(run_dir / "checkpoints/last/state.json") or {}).get("run")
    if not isinstance(saved, dict):  # there is none yet, or no longer
        lines = _lines(run_dir / METRICS)
    before = saved.get("best") if isinstance(saved, dict) else None
    found = [line for line in lines if line.get("split") == "val"] + ([before] if isinstance(before, dict) else [])
    found = [line for line in found if number(line, "top1") is not None]
    return max(found, key=lambda line: (line["top1"], -loss_of(line)), default=None)


def number(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    return value if isinstance(value, (int, float)) else None


def loss_of(evaluation: Mapping[str, Any]) -> float:
    """For ranking: an evaluation without a finite loss comes last."""
    loss = number(evaluation, "loss")
    return math.inf if loss is None else loss


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The evaluations of a run so far, as metrics.jsonl has them."""
    return [line for line in _lines(run_dir / METRICS) if line.get("split") == "val"]


def _lines(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl that are whole, or those within its `last` bytes."""
    found = []
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - last) if last is not None else 0)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # one that is being written, or was cut
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
