"""Why runs failed: the last message in their output, and how Slurm says that their jobs ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.job_output import last_message, output_files
from launch.records import read_record
from launch.run_status import RunStatus
from launch.squeue import read_ended


def explain_failures(runs: Sequence[RunStatus]) -> list[RunStatus]:
    """The same statuses; failed runs have the reason and the file with their output. Slurm's accounting is asked once
    about all jobs that squeue has forgotten, if there is accounting."""
    forgotten = [run for run in runs if run.state == "failed" and run.slurm is None and run.job_id is not None]
    of_slurm = [run for run in forgotten if (read_record(run.run_dir) or {}).get("cluster") in ("slurm", None)]
    ended = read_ended(sorted({str(run.job_id) for run in of_slurm}))
    return [_explain(run, ended.get(run.job_id or "")) if run.state == "failed" else run for run in runs]


def _explain(run: RunStatus, ended: str | None) -> RunStatus:
    files = output_files(run.run_dir, read_record(run.run_dir))
    log = files[min(files)] if files else None
    message = last_message(log) if log is not None else None
    slurm = run.slurm or ended
    job = f" (job {run.job_id} is {slurm})" if slurm is not None else ""
    if message is not None:
        detail: str | None = f"{message}{job}"
    elif ended is not None:
        detail = f"exited without writing a status{job}"
    else:
        detail = run.detail
    return replace(run, detail=detail, slurm=slurm, log=log)
