"""Cancel the jobs of a run or sweep: `python -m launch.cancel RUN_OR_SWEEP [--pending]`.

Running jobs save a checkpoint first. The command that submitted them submits them again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, UserError, listed
from distil_tl.utils.home import path_argument
from launch.adaptive import refuse_other_search
from launch.args import print_line
from launch.local_job import is_job_alive, stop_job
from launch.records import read_record, read_sweep_record
from launch.run_status import RunStatus
from launch.squeue import SlurmUnavailableError, cancel_jobs
from launch.status import WAITING, is_run, read_overview

SHOWN = 10  # job ids that are printed
AT_ONCE = 500  # jobs in one call of scancel


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.cancel", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=path_argument, help="a run directory, or the folder of a sweep")
    parser.add_argument("--pending", action="store_true", help="only jobs that wait; running ones continue")
    options = parser.parse_args(args)
    return run_command("launch.cancel", lambda: cancel(options.dir, pending=options.pending))


def cancel(folder: Path, *, pending: bool = False) -> int:
    """Cancel the jobs of a run or of all trials of a sweep; with `pending` only those that wait.

    Raises:
        UserError: `folder` is neither, or a search submits trials there.
    """
    folder = folder.absolute()
    if folder.is_dir() and not is_run(folder) and read_sweep_record(folder) is None:
        raise UserError(f"{folder} is neither a run directory nor a sweep; give one of them")
    refuse_other_search(folder)
    overview = read_overview(folder)
    states = WAITING if pending else (*WAITING, "running")
    runs = [run for run, _ in overview.rows if run.state in states]
    jobs, local, others = sort_by_kind(runs)
    if overview.note is not None and any(run.state in (*states, "unknown") for run, _ in overview.rows):
        sys.stderr.write(f"launch.cancel: {overview.note}\n")
    for job in local:
        stop_job(job)
    try:
        for start in range(0, len(jobs), AT_ONCE):
            cancel_jobs(jobs[start : start + AT_ONCE])
    except SlurmUnavailableError as error:
        sys.stderr.write(f"launch.cancel: {error}\n")
        return EXIT_FAULT
    cancelled = [*jobs, *local]
    for run in others:
        sys.stderr.write(f"launch.cancel: {run.run_dir} was not started by launch; end its process on {run.host}\n")
    if not cancelled and not others:
        print_line("nothing to cancel: no job is waiting" + ("" if pending else " or running"))
    elif cancelled:
        print_line(f"cancelled {len(cancelled)} job{'s'[: len(cancelled) > 1]}: {listed(cancelled, SHOWN)}")
    return EXIT_FAULT if others or (overview.note is not None and not cancelled) else 0


def sort_by_kind(runs: Sequence[RunStatus]) -> tuple[list[str], list[str], list[RunStatus]]:
    """Ids of Slurm jobs, ids of local jobs, and runs that are neither."""
    jobs: list[str] = []
    local: list[str] = []
    others: list[RunStatus] = []
    for run in runs:
        record = read_record(run.run_dir)
        if run.slurm is not None and run.job_id is not None:
            jobs.append(run.job_id)
        elif record is not None and is_job_alive(record):
            local.append(str(record["job_id"]))
        else:
            others.append(run)
    return jobs, local, others


if __name__ == "__main__":
    sys.exit(main())
