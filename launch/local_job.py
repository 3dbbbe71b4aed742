"""Jobs of `--cluster local` and `debug`: starting, waiting, stopping, exit status."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED
from launch.executor import start_job
from launch.records import write_record


def start_recorded(executor: Any, run_dir: Path, task: Callable[[], int], cluster: str) -> Any:
    """Start a run on this machine, and record its job. Returns submitit's job.

    Raises:
        OSError: the record can't be written; the job is stopped.
    """
    job = start_job(executor, task)
    try:
        (run_dir / "summary.json").unlink(missing_ok=True)  # it is about the previous attempt
        write_record(run_dir, job.job_id, cluster)
    except OSError:
        stop_job(job.job_id)
        raise
    return job


def wait_for_job(job: Any, cluster: str) -> int:
    """Wait for a local job and return its exit status. Ctrl-C asks the job to save and stop."""
    interrupted = False
    while True:
        try:
            job.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            stop_job(job.job_id)
    status = exit_status(job, cluster, default=EXIT_PREEMPTED if interrupted else EXIT_FAULT)
    if status == EXIT_PREEMPTED:
        sys.stderr.write("launch: the job was stopped; run the same command to resume\n")
    elif status != 0:
        sys.stderr.write(f"launch: the job failed; its output is in {job.paths.stdout}\n")
    return status


def exit_status(job: Any, cluster: str, *, default: int) -> int:
    """The exit status of an ended local job: the smallest that is not 0 among its tasks.

    Args:
        default: status of a task that left no result, as it was killed.
    """
    statuses = job.results() if cluster == "debug" else []
    for number in range(0 if cluster == "debug" else job.num_tasks):
        task = job.task(number)
        if not task.paths.result_pickle.exists():
            statuses.append(default)
        else:
            statuses.append(EXIT_FAULT if task.exception() is not None else task.result())
    return min((status for status in statuses if status != 0), default=0)


def stop_job(job_id: str) -> None:
    """Ask a local job to save and stop. submitit's `cancel` ends only the shell around it."""
    with suppress(OSError):  # it has ended, or this is not Linux, where Ctrl-C reaches the processes anyway
        for child in Path(f"/proc/{job_id}/task/{job_id}/children").read_text(encoding="utf-8").split():
            os.kill(int(child), signal.SIGTERM)  # submitit's controller, which forwards it to the tasks


def is_job_alive(record: Mapping[str, Any] | None) -> bool:
    """Whether the job of a submitted.json is a local job of this machine that still runs, or is just starting."""
    if record is None or record["cluster"] != "local" or record.get("host") != socket.gethostname():
        return False
    try:  # another process may have this pid by now
        return b"submitit.local" in Path(f"/proc/{record['job_id']}/cmdline").read_bytes()
    except OSError:
        return False
