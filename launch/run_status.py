"""The status of a submitted run, from its run directory and from Slurm's queue."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distil_tl.rundir.lock import is_alive
from distil_tl.training.config import METRICS, rank_by
from distil_tl.training.remaining import planned_epochs, time_left
from distil_tl.utils.args import read_yaml
from distil_tl.utils.data_wait import wait_share
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import read_text
from distil_tl.utils.intervals import of_counts
from launch.evidence import METRICS_FILE, Evidence, Json, gather_evidence, read_lines
from launch.local_job import is_job_alive
from launch.records import has_started, read_json
from launch.squeue import QueuedJob

CONFIGS = ("config.yaml", "slurm/config.yaml")  # the second one of a run that waits, and of a selection
PRUNED_FILE = "pruned.json"  # written by the adaptive search when it ends a trial early
QUIET_S = 900  # a run that can't be checked counts as running if it wrote a line within this time
STATES = ("completed", "running", "pending", "requeued", "stopped", "failed", "pruned", "unknown", "missing")


@dataclass(frozen=True)
class RunStatus:
    """The status of one run.

    Attributes:
        state: one of STATES.
        progress: fraction of the epochs of all stages, 0 to 1.
        best: the best evaluation so far.
        intervals: 95 % intervals of its figures, by name, as far as they are known.
        restarts: how often Slurm restarted the job.
        host: where it runs.
        seconds: total training time.
        data_wait: the share of the last recorded part of training for which it waited for data.
        detail: more about the state, such as why the run failed.
        slurm: how Slurm calls the state of the job, and why.
        left: time until the job's time limit.
        remaining: how long training will still take, in words, after the first epoch of a stage.
        log: the file with its output, of a failed run.
        data: the images that it trains on.
    """

    run_dir: Path
    state: str
    progress: float | None = None
    best: dict[str, Any] | None = None
    intervals: dict[str, Sequence[float]] = field(default_factory=dict)
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
    remaining: str | None = None
    log: Path | None = None
    data: str | None = None


def read_status(run_dir: Path, queue: Mapping[str, QueuedJob] | None) -> RunStatus:
    """The status of the run in `run_dir`. `queue` is None if Slurm does not answer."""
    seen = gather_evidence(run_dir, queue)
    state, detail = decide_state(seen)
    summary, attempt, record, job = seen.summary, seen.attempt or {}, seen.record, seen.job
    best = summary.get("best")
    best = best if isinstance(best, dict) else _best(run_dir, seen.lines)
    return RunStatus(
        run_dir,
        state,
        progress=1.0 if state == "completed" else _progress(run_dir, seen.last),
        remaining=_remaining(run_dir, seen.lines) if state == "running" else None,
        best=best,
        intervals=_intervals(summary, best or {}),
        stage=seen.last.get("stage"),
        epoch=seen.last.get("epoch"),
        step=seen.last.get("step"),
        job_id=_job_id(job, record, attempt),
        restarts=attempt.get("restarts", 0),
        host=job.nodes if job and job.nodes else attempt.get("host") if state == "running" else None,
        seconds=summary.get("total_seconds"),
        data_wait=wait_share(next((line for line in reversed(seen.lines) if line.get("split") == "train"), {})),
        detail=detail,
        slurm=None if job is None else f"{job.state}{f', {job.reason}' if job.reason not in ('', 'None') else ''}",
        data=data_of(run_dir),
        left=job.left if job is not None and job.state == "RUNNING" and job.left[:1].isdigit() else None,
    )


def _intervals(summary: Json, best: Json) -> dict[str, Sequence[float]]:
    """The intervals of the best evaluation: as a completed run recorded them, else those of counts alone."""
    saved = summary.get("intervals")
    found = {name: pair for name, pair in saved.items() if _is_pair(pair)} if isinstance(saved, dict) else {}
    return {**of_counts(best), **found}


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, (int, float)) for end in value)


def _job_id(job: QueuedJob | None, record: Json | None, attempt: Json) -> str | None:
    if record is None or (job is not None and job.is_active):
        return job.id if job is not None else attempt.get("slurm_job_id")
    return str(record["job_id"])


def decide_state(seen: Evidence) -> tuple[str, str | None]:
    """The state, and a detail about it."""
    status, job, attempt, record = seen.summary.get("status"), seen.job, seen.attempt, seen.record
    if status == "completed" and not (job is not None and job.is_waiting):  # it waits if it was extended by a stage
        return "completed", None
    if (seen.run_dir / PRUNED_FILE).exists():
        return "pruned", None
    has_run = attempt is not None and (record is None or attempt.get("started_at", "") >= record["time"])
    if job is not None and job.is_active:
        if job.is_waiting:
            return ("requeued" if has_run else "pending"), (job.reason if job.reason != "None" else None)
        return "running", None
    if _is_training_here(attempt) or is_job_alive(record):
        return "running", None
    if status == "preempted" and seen.unchecked is None:  # otherwise it may be in Slurm's queue again
        return "stopped", "preempted and saved; submit it again to resume"
    if status == "failed":
        return "failed", None
    if seen.unchecked is not None:
        written = get_number(seen.last, "time")
        recent = written is not None and time.time() - written < QUIET_S
        return ("running" if recent else "unknown"), seen.unchecked
    if attempt is None and record is None:
        return "missing", None
    if job is not None and job.state == "CANCELLED":
        return "stopped", "cancelled"
    never_ran = record is not None and record["cluster"] == "slurm" and not has_run
    if job is None and record is not None and never_ran and not has_started(seen.run_dir, record):
        return "stopped", "its job was cancelled before it started; submit it again"
    reason = f"job {job.id} is {job.state}" if job is not None else "its job is no longer in the queue"
    return "failed", f"exited without writing a status ({reason})"


def _is_training_here(attempt: Json | None) -> bool:
    return attempt is not None and "ended_at" not in attempt and is_alive(attempt)


def _remaining(run_dir: Path, lines: list[dict[str, Any]]) -> str | None:
    """How long training will still take, after its last complete epoch; None if the files don't tell."""
    epochs = [line for line in lines if line.get("window") == "epoch"]
    if len(epochs) < 2 or epochs[-1].get("split") != "val":
        return None
    trained, evaluated = epochs[-2:]
    try:
        seconds = trained["seconds"] + evaluated["seconds"]
        return time_left(_epochs(run_dir), evaluated["stage"], evaluated["epoch"], seconds) or None
    except (UserError, LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _epochs(run_dir: Path) -> dict[str, int]:
    """The epochs of each stage, by name."""
    return planned_epochs(read_yaml(run_dir / "config.yaml")["stages"], _saved_state(run_dir) or {})


def _saved_state(run_dir: Path) -> dict[str, Any] | None:
    """The state of the run in its last checkpoint; None without one."""
    saved = (read_json(run_dir / "checkpoints/last/state.json") or {}).get("run")
    return saved if isinstance(saved, dict) else None


def _progress(run_dir: Path, last: Json) -> float | None:
    """The fraction of epochs done, over all stages; None if the files don't tell."""
    try:
        epochs = _epochs(run_dir)
        names = list(epochs)
        before = sum(epochs[name] for name in names[: names.index(last["stage"])])
        done = last["epoch"] if last["split"] == "val" else last["epoch"] - 1
        fraction: float = (before + done) / max(1, sum(epochs.values()))
    except (UserError, LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return fraction


def _best(run_dir: Path, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best evaluation: of the last `lines` of metrics.jsonl and the best until then, which a checkpoint holds."""
    saved = _saved_state(run_dir)
    if saved is None:  # without a checkpoint, read the whole file
        lines = read_lines(run_dir / METRICS_FILE)
    before = None if saved is None else saved.get("best")
    evaluations = [line for line in lines if line.get("split") == "val"]
    if isinstance(before, dict):
        evaluations.append(before)
    metric = metric_of(run_dir)
    scored = [line for line in evaluations if get_number(line, metric) is not None]
    return min(scored, key=lambda line: rank_by(metric, {**line, "loss": loss_of(line)}), default=None)


def metric_of(run_dir: Path) -> str:
    """What chooses the best epoch of a run: as recorded with it, or by its line of config.yaml."""
    best = (_saved_state(run_dir) or {}).get("best")
    if isinstance(best, dict) and best.get("metric") in METRICS:
        return str(best["metric"])
    for name in CONFIGS:
        with suppress(OSError, UnicodeDecodeError):
            found = re.search(r"^metric: (\w+)$", read_text(run_dir / name), re.MULTILINE)
            return found[1] if found and found[1] in METRICS else "top1"
    return "top1"


def data_of(run_dir: Path) -> str | None:
    """The images that a run trains on, from its configuration; None before that is written. Not all of it is parsed."""
    for name in CONFIGS:
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            section = re.search(r"^data:\n((?: .*\n)*)", read_text(run_dir / name) + "\n", re.MULTILINE)
            lines = re.findall(r"^  (?:root|labels): .*", section[1], re.MULTILINE) if section is not None else []
            given = [yaml.safe_load(line.strip()) for line in lines]
            if given:
                return (
                    ", ".join(str(value) for entry in given for value in entry.values() if value) or "embedded digits"
                )
    return None


def get_number(line: Json, key: str) -> float | None:
    """The value of a key if it is a finite number."""
    value = line.get(key)
    return value if isinstance(value, (int, float)) and abs(value) < 1e300 else None


def loss_of(evaluation: Json) -> float:
    """The loss, for ranking: infinity if it is missing."""
    loss = get_number(evaluation, "loss")
    return math.inf if loss is None else loss


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """All evaluations in a run's metrics.jsonl, in order."""
    return [line for line in read_lines(run_dir / METRICS_FILE) if line.get("split") == "val"]
