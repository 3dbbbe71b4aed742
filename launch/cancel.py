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
from launch.args import print_line
from launch.local_job import is_job_alive, stop_job
from launch.records import read_record, read_sweep_record
from launch.search_lock import refuse_other_search
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
    jobs: list[str] = []
    local: list[str] = []
    problems: list[str] = [overview.note] if overview.note is not None else []
    for run, _ in overview.rows:
        record = read_record(run.run_dir)
        if run.state == "unknown":
            problems.append(f"{run.run_dir.name} is not cancelled: {run.detail}")
        elif run.state in states and run.slurm is not None and run.job_id is not None:
            jobs.append(run.job_id)
        elif run.state in states and record is not None and is_job_alive(record):
            local.append(str(record["job_id"]))
        elif run.state in states:
            why = run.detail or f"launch did not start it; end its process on {run.host}"
            problems.append(f"{run.run_dir.name} is not cancelled: {why}")
    for job in local:
        stop_job(job)
    cancelled: list[str] = []
    try:
        for start in range(0, len(jobs), AT_ONCE):
            cancel_jobs(jobs[start : start + AT_ONCE])
            cancelled += jobs[start : start + AT_ONCE]
    except SlurmUnavailableError as error:
        problems.append(str(error))
    for problem in problems:
        sys.stderr.write(f"launch.cancel: {problem}\n")
    cancelled += local
    if cancelled:
        print_line(f"cancelled {len(cancelled)} job{'s'[: len(cancelled) > 1]}: {listed(cancelled, SHOWN)}")
    elif not problems:
        print_line("nothing to cancel: no job is waiting" + ("" if pending else " or running"))
    return EXIT_FAULT if problems else 0


if __name__ == "__main__":
    sys.exit(main())
