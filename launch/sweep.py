"""Submit a sweep: `python -m launch.sweep SWEEP.yaml [key=value ...]`, one Slurm array with a run for each trial.

Each trial has its own run directory SWEEP_DIR/NAME; NAME is a hash of the values that it sets. The same command again
submits the trials that are missing.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED
from distil_tl.utils.log import setup_console
from launch.args import CLUSTERS, argument_parser, print_line
from launch.executor import describe_resources, make_executor, sbatch_script
from launch.local_job import wait_for_job
from launch.records import read_record
from launch.run_status import RunStatus, read_status
from launch.snapshot import take_snapshot
from launch.squeue import QueuedJob, SlurmUnavailableError, read_queue
from launch.sweep_plan import SweepPlan, plan_trials, read_sweep_args, refuse_other_common, save_plan, submit_trials


def main(args: Sequence[str] | None = None) -> int:
    parser = argument_parser("python -m launch.sweep", __doc__)
    parser.add_argument("--dir", type=Path, help="folder for the run directories of the trials (default: sweeps/NAME)")
    parser.add_argument(
        "--cluster", choices=CLUSTERS[:2], default="slurm", help="local: on this machine, one trial after another"
    )
    parser.add_argument(
        "--resubmit-failed", action="store_true", help="also resume failed trials, from their last checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the trials and print the batch script; submit nothing"
    )
    options, rest = parser.parse_known_args(args)
    return run_command("launch.sweep", lambda: submit_sweep(rest, **vars(options)))


def submit_sweep(args: Sequence[str], dir: Path | None, cluster: str, resubmit_failed: bool, dry_run: bool) -> int:
    """Check all trials, and submit those that are missing or stopped. Local trials run one after another.

    Args:
        dir: holds the run directories of the trials; sweeps/NAME if None.
        cluster: slurm or local.
        resubmit_failed: submits failed trials, too.
        dry_run: only prints.

    Returns:
        0, or the exit status of local trials.

    Raises:
        UserError: a trial can't work, or sbatch refuses the array. Nothing was submitted.
    """
    setup_console(True)
    sweep_args = read_sweep_args("launch.sweep", args, dir)
    plan = plan_trials(sweep_args, cluster, sweep_args.sweep.all_trials())
    refuse_other_common(plan)
    statuses = read_statuses(list(plan.trials), cluster)
    submittable = {"missing", "stopped", *(["failed"] if resubmit_failed else [])}
    todo = [run_dir for run_dir, status in statuses.items() if status.state in submittable]
    if dry_run:
        print_dry_run(plan, statuses, todo, cluster)
        return 0
    print_not_submitted(statuses, todo, resubmit_failed)
    save_plan(plan)
    monitor = f"monitor with: python -m launch.status {shlex.quote(str(plan.folder))}"
    if not todo:
        print_line(f"nothing to submit; {monitor}")
        return 0
    executor = make_executor(plan.folder, take_snapshot(plan.folder), plan.slurm, cluster, name=plan.sweep.name)
    status = 0
    if cluster == "slurm":
        jobs = submit_trials(plan, executor, todo, cluster)
        job_id = jobs[0].job_id.partition("_")[0]
        print_line(
            f"submitted job {job_id}: {len(jobs)} trials, each on {describe_resources(plan.slurm, cluster)}; at most "
            f"{plan.slurm.array_parallelism} run at once"
        )
    else:
        status = run_locally(plan, executor, todo)
    print_line(monitor)
    return status


def read_statuses(run_dirs: Sequence[Path], cluster: str) -> dict[Path, RunStatus]:
    """The status of each trial. squeue is called only if there can be Slurm jobs."""
    records = [record for run_dir in run_dirs if (record := read_record(run_dir)) is not None]
    queue: dict[str, QueuedJob] | None = {}
    if "slurm" in {cluster, *(record["cluster"] for record in records)}:
        try:
            queue = read_queue()
        except SlurmUnavailableError as error:
            queue = None
            sys.stderr.write(f"launch: {error}; the states of jobs are read from their files only\n")
    return {run_dir: read_status(run_dir, queue) for run_dir in run_dirs}


def print_dry_run(plan: SweepPlan, statuses: dict[Path, RunStatus], todo: list[Path], cluster: str) -> None:
    for run_dir, (trial, _) in plan.trials.items():
        state = "would be submitted" if run_dir in todo else statuses[run_dir].state
        print_line(f"{run_dir.name}  {' '.join(trial.arguments)}  {state}")
    if cluster == "slurm" and todo:
        print_line(sbatch_script(plan.folder, plan.slurm, cluster, name=plan.sweep.name, tasks=len(todo)))


def print_not_submitted(statuses: dict[Path, RunStatus], todo: list[Path], resubmit_failed: bool) -> None:
    counts = Counter(status.state for run_dir, status in statuses.items() if run_dir not in todo)
    if counts:
        listing = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        print_line(f"not submitted: {listing}")
    if counts["failed"] and not resubmit_failed:
        print_line("to resume failed trials, add --resubmit-failed")


def run_locally(plan: SweepPlan, executor: Any, run_dirs: Sequence[Path]) -> int:
    """Run trials on this machine, one after another, until one is stopped. The exit status: a fault if any failed."""
    failed = 0
    for number, run_dir in enumerate(run_dirs, start=1):
        print_line(f"trial {number} of {len(run_dirs)}: {run_dir}")
        (job,) = submit_trials(plan, executor, [run_dir], "local")
        status = wait_for_job(job, "local")
        if status == EXIT_PREEMPTED:
            return status
        failed += status != 0
    if failed:
        print_line(f"{failed} of {len(run_dirs)} trials failed")
    return EXIT_FAULT if failed else 0


if __name__ == "__main__":
    sys.exit(main())
