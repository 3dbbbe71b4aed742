"""Submit a sweep: `python -m launch.sweep SWEEP.yaml [key=value ...]`, one Slurm array with a run for each trial.

Each trial has its own run directory SWEEP_DIR/NAME; NAME is a hash of the values that it sets. The same command again
submits the trials that are missing.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import setup_console
from launch.args import CLUSTERS, add_submission_options, argument_parser, ids_only, print_line
from launch.executor import describe_resources, make_executor, sbatch_script
from launch.local_job import wait_for_job
from launch.records import read_record
from launch.run_status import RunStatus, read_status
from launch.snapshot import take_snapshot
from launch.squeue import QueuedJob, SlurmUnavailableError, max_array_size, read_queue, set_array_parallelism
from launch.status import WAITING
from launch.sweep_plan import SweepPlan, plan_trials, read_sweep_args, refuse_other_common, save_plan, submit_trials
from launch.test_only import refuse_impossible


def main(args: Sequence[str] | None = None) -> int:
    parser = argument_parser("python -m launch.sweep", __doc__)
    parser.add_argument(
        "--dir", type=path_argument, help="folder for the run directories of the trials (default: sweeps/NAME)"
    )
    parser.add_argument(
        "--cluster", choices=CLUSTERS[:2], default="slurm", help="local: on this machine, one trial after another"
    )
    parser.add_argument(
        "--resubmit-failed", action="store_true", help="also resume failed trials, from their last checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the trials and print the batch script; submit nothing"
    )
    add_submission_options(parser)
    options, rest = parser.parse_known_args(args)
    settings = vars(options)
    with ids_only(settings.pop("parsable")) as print_id:
        return run_command("launch.sweep", lambda: submit_sweep(rest, **settings, print_id=print_id))


def submit_sweep(
    args: Sequence[str],
    dir: Path | None,
    cluster: str,
    resubmit_failed: bool,
    dry_run: bool,
    no_test: bool,
    print_id: Callable[[str], None],
) -> int:
    """Check all trials, and submit those that are missing or stopped. Local trials run one after another.

    Args:
        dir: holds the run directories of the trials; sweeps/NAME if None.
        cluster: slurm or local.
        resubmit_failed: submits failed trials, too.
        dry_run: only prints.
        no_test: does not ask Slurm first whether it could run the jobs.
        print_id: writes the id of the array for scripts.

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
    left: list[Path] = []
    if cluster == "slurm" and len(todo) > 1:
        limit = max_array_size() or len(todo)
        todo, left = todo[:limit], todo[limit:]
    if dry_run:
        print_dry_run(plan, statuses, todo, cluster)
        return 0
    print_not_submitted(statuses, [*todo, *left], resubmit_failed)
    if cluster == "slurm" and any(pair.startswith("slurm.array_parallelism=") for pair in args):
        change_parallelism(statuses.values(), plan.slurm.array_parallelism)
    if cluster == "slurm" and todo and not no_test:
        script = sbatch_script(plan.folder, plan.slurm, cluster, name=plan.sweep.name, tasks=len(todo))
        refuse_impossible(script, plan.slurm)
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
        print_id(job_id)
        print_line(
            f"submitted job {job_id}: {len(jobs)} trials, each on {describe_resources(plan.slurm, cluster)}; at most "
            f"{plan.slurm.array_parallelism} run at once"
        )
        if left:
            print_line(
                f"not submitted yet: {len(left)} trials, as an array of this cluster has at most {len(todo)} tasks "
                f"(MaxArraySize); run the same command again to submit them"
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


def change_parallelism(statuses: Iterable[RunStatus], tasks: int) -> None:
    """Change how many tasks of the arrays that still have trials in the queue may run at once."""
    waiting = [status.job_id for status in statuses if status.state in WAITING and status.slurm is not None]
    for array in sorted({job.partition("_")[0] for job in waiting if job is not None and "_" in job}):
        try:
            set_array_parallelism(array, tasks)
        except SlurmUnavailableError as error:
            sys.stderr.write(f"launch: {error}; job {array} is not changed\n")
        else:
            print_line(f"job {array}: now at most {tasks} trials run at once")


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
