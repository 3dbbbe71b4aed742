"""Submit a sweep: `python -m launch.sweep SWEEP.yaml [key=value ...]`, one Slurm array with a run for each trial.

Each trial has its own run directory SWEEP_DIR/NAME; NAME is a hash of the values that it sets. The same command again
submits the trials that are missing.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED, listed
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import setup_console
from launch.args import ASSUME_ENDED, CLUSTERS, add_submission_options, argument_parser, ids_only, print_line
from launch.evidence import ask_slurm
from launch.executor import describe_resources, make_executor, sbatch_script
from launch.folder_lock import submission_lock
from launch.local_job import wait_for_job
from launch.run_status import RunStatus, read_status
from launch.snapshot import take_snapshot
from launch.squeue import SlurmUnavailableError, max_array_size, set_array_parallelism
from launch.status import WAITING
from launch.submission import nothing_submitted, submitting
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
    parser.add_argument("--assume-ended", action="store_true", help=ASSUME_ENDED)
    parser.add_argument(
        "--dry-run", action="store_true", help="list the trials and print the batch script; submit nothing"
    )
    add_submission_options(parser)
    options, rest = parser.parse_known_args(args)
    settings = vars(options)
    with ids_only(settings.pop("parsable")) as print_id:
        return run_command("launch.sweep", lambda: submit_sweep(rest, **settings, print_id=print_id))


# Longer than a screen: what is checked before the lock is checked again behind it, in the same order.
def submit_sweep(
    args: Sequence[str],
    dir: Path | None,
    cluster: str,
    resubmit_failed: bool,
    assume_ended: bool,
    dry_run: bool,
    no_test: bool,
    print_id: Callable[[str], None],
) -> int:
    """Check all trials, and submit those that are missing or stopped. Local trials run one after another.

    Args:
        dir: holds the run directories of the trials; sweeps/NAME if None.
        cluster: slurm or local.
        resubmit_failed: submits failed trials, too.
        assume_ended: submits trials whose state can't be checked, too.
        dry_run: only prints.
        no_test: does not ask Slurm first whether it could run the jobs.
        print_id: writes the id of the array for scripts.

    Returns:
        0, or the exit status of local trials.

    Raises:
        UserError: a trial can't work, or sbatch refuses the array. Nothing was submitted.
        WriteError: the array is submitted, but can't be recorded.
    """
    setup_console(True)
    sweep_args = read_sweep_args("launch.sweep", args, dir)
    plan = plan_trials(sweep_args, cluster, sweep_args.sweep.all_trials())
    refuse_other_common(plan)
    states = {"missing", "stopped", *(["failed"] if resubmit_failed else []), *(["unknown"] if assume_ended else [])}
    statuses, todo, left = find_todo(plan, states, cluster, quiet=not dry_run)
    if dry_run:
        print_dry_run(plan, statuses, todo, cluster)
        return 0
    if cluster == "slurm" and todo and not no_test:
        script = sbatch_script(plan.folder, plan.slurm, cluster, name=plan.sweep.name, tasks=len(todo))
        refuse_impossible(script, plan.slurm)
    monitor = f"monitor with: python -m launch.status {shlex.quote(str(plan.folder))}"
    with submitting(plan.folder) as lock:
        refuse_other_common(plan)
        statuses, todo, left = find_todo(plan, states, cluster)
        print_not_submitted(statuses, [*todo, *left], resubmit_failed)
        if cluster == "slurm" and any(pair.startswith("slurm.array_parallelism=") for pair in args):
            change_parallelism(statuses.values(), plan.slurm.array_parallelism)
        save_plan(plan)
        if not todo:
            print_line(f"nothing to submit; {monitor}")
            return 0
        executor = make_executor(plan.folder, take_snapshot(plan.folder), plan.slurm, cluster, name=plan.sweep.name)
        if cluster == "slurm":
            jobs = submit_trials(plan, executor, todo, cluster, lock)
    status = 0
    if cluster == "slurm":
        print_id(jobs[0].job_id.partition("_")[0])
        print_submitted(plan, jobs, left)
    else:
        status = run_locally(plan, executor, todo, states)
    print_line(monitor)
    return status


def find_todo(
    plan: SweepPlan, states: Collection[str], cluster: str, *, quiet: bool = False
) -> tuple[dict[Path, RunStatus], list[Path], list[Path]]:
    """The status of each trial, the trials to submit now, and those for which an array has no room.

    Args:
        states: in which a trial is submitted.
        quiet: does not say when Slurm does not answer.
    """
    statuses = read_statuses(list(plan.trials), quiet=quiet)
    todo = [run_dir for run_dir, status in statuses.items() if status.state in states]
    if cluster != "slurm" or len(todo) < 2:
        return statuses, todo, []
    limit = max_array_size() or len(todo)
    return statuses, todo[:limit], todo[limit:]


def read_statuses(run_dirs: Sequence[Path], *, quiet: bool = False) -> dict[Path, RunStatus]:
    """The status of each trial. squeue is called only if there are Slurm jobs."""
    queue, why = ask_slurm(run_dirs)
    if why is not None and not quiet:
        sys.stderr.write(f"launch: {why}; the states of jobs are read from their files only\n")
    return {run_dir: read_status(run_dir, queue) for run_dir in run_dirs}


def print_submitted(plan: SweepPlan, jobs: Sequence[Any], left: Sequence[Path]) -> None:
    print_line(
        f"submitted job {jobs[0].job_id.partition('_')[0]}: {len(jobs)} trials, each on "
        f"{describe_resources(plan.slurm, 'slurm')}; at most {plan.slurm.array_parallelism} run at once"
    )
    if left:
        print_line(
            f"not submitted yet: {len(left)} trials, as an array of this cluster has at most {len(jobs)} tasks "
            f"(MaxArraySize); run the same command again to submit them"
        )


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
    unknown = dict.fromkeys(str(status.detail) for status in statuses.values() if status.state == "unknown")
    if counts["unknown"]:
        print_line(f"unknown: {listed(list(unknown), 3)}. If you know that they have ended, add --assume-ended")


def run_locally(plan: SweepPlan, executor: Any, run_dirs: Sequence[Path], states: Collection[str]) -> int:
    """Run trials on this machine, one after another, until one is stopped. The exit status: a fault if any failed.

    Args:
        states: in which a trial is run; another process may have run it meanwhile.
    """
    failed = 0
    for number, run_dir in enumerate(run_dirs, start=1):
        with nothing_submitted(plan.folder), submission_lock(plan.folder) as lock:
            state = read_statuses([run_dir])[run_dir].state
            if state not in states:
                print_line(f"trial {number} of {len(run_dirs)}: {run_dir} is {state} now")
                continue
            print_line(f"trial {number} of {len(run_dirs)}: {run_dir}")
            (job,) = submit_trials(plan, executor, [run_dir], "local", lock)
        status = wait_for_job(job, "local")
        if status == EXIT_PREEMPTED:
            return status
        failed += status != 0
    if failed:
        print_line(f"{failed} of {len(run_dirs)} trials failed")
    return EXIT_FAULT if failed else 0


if __name__ == "__main__":
    sys.exit(main())
