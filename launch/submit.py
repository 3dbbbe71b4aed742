"""Submit a run: `python -m launch.submit CONFIG.yaml slurm.nodes=2 slurm.gpus_per_node=8 key=value ...`.

A copy of the code, the resolved configuration and the batch script go to RUN_DIR. Shortly before its time limit the job
saves and is requeued, until training is complete.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distil_tl.utils.args import to_yaml
from distil_tl.utils.command import run_command
from distil_tl.utils.files import write_atomic
from distil_tl.utils.log import setup_console
from launch.args import ASSUME_ENDED, CLUSTERS, add_submission_options, argument_parser, ids_only, print_line, read_run
from launch.executor import describe_resources, make_executor, sbatch_script
from launch.job import Training
from launch.local_job import start_recorded, wait_for_job
from launch.preflight import check_submission, refuse_active_run
from launch.records import read_open_submissions
from launch.snapshot import take_snapshot
from launch.submission import submit_to_slurm, submitting
from launch.test_only import refuse_impossible


def main(args: Sequence[str] | None = None) -> int:
    parser = argument_parser("python -m launch.submit", __doc__)
    parser.add_argument(
        "--cluster", choices=CLUSTERS, default="slurm", help="local: processes of this machine; debug: this process"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, and submit nothing")
    parser.add_argument("--assume-ended", action="store_true", help=ASSUME_ENDED)
    add_submission_options(parser)
    options, rest = parser.parse_known_args(args)
    chosen = {name: value for name, value in vars(options).items() if name != "parsable"}
    with ids_only(options.parsable) as print_id:
        return run_command("launch.submit", lambda: submit(rest, **chosen, print_id=print_id))


def submit(
    args: Sequence[str],
    cluster: str,
    dry_run: bool,
    assume_ended: bool,
    no_test: bool,
    print_id: Callable[[str], None],
) -> int:
    """Check and submit a run, or with `dry_run` print its batch script. Waits for a local job.

    Args:
        assume_ended: submits a run whose state can't be checked, too.
        no_test: does not ask Slurm first whether it could run the job.
        print_id: writes the job id for scripts.

    Returns:
        0, or the exit status of a local job.

    Raises:
        UserError: the run can't work, or sbatch refuses it. Nothing was submitted.
        WriteError: the job is submitted, but can't be recorded.
    """
    setup_console(True)
    config, unresolved, slurm = read_run(args)  # before torch is imported, so that a typo is refused at once
    from distil_tl.rundir.opening import look_for_start

    assert config.run_dir is not None
    run_dir = Path(config.run_dir).absolute()
    unresolved.run_dir = str(run_dir)
    check_submission(config, slurm, cluster)
    if not dry_run and read_open_submissions(run_dir):  # of a command that was killed
        with submitting(run_dir):
            pass
    refuse_active_run(run_dir, assume_ended=assume_ended, dry_run=dry_run)
    if look_for_start(asdict(config), unresolved).completed and not dry_run:
        print_line(f"the run in {run_dir} is already completed; for another run change seed or run_dir")
        return 0
    if config.resume == "never":  # is checked above; a requeued job must resume from its own checkpoints
        unresolved.resume = "auto"
    if dry_run:
        print_line(sbatch_script(run_dir, slurm, cluster, name=run_dir.name))
        return 0
    if cluster == "slurm" and not no_test:
        refuse_impossible(sbatch_script(run_dir, slurm, cluster, name=run_dir.name), slurm)
    with submitting(run_dir) as lock:
        refuse_active_run(run_dir, assume_ended=assume_ended, dry_run=dry_run)
        path = run_dir / "slurm" / "config.yaml"
        write_atomic(path, to_yaml(unresolved))
        executor = make_executor(run_dir, take_snapshot(run_dir), slurm, cluster, name=run_dir.name)
        task = Training(str(path), str(Path.cwd()))
        if cluster == "slurm":
            (job,) = submit_to_slurm(executor, run_dir, [run_dir], [task], lock)
        else:
            job = start_recorded(executor, run_dir, task, cluster)
    print_id(str(job.job_id))
    print_submitted(job, run_dir, describe_resources(slurm, cluster))
    return 0 if cluster == "slurm" else wait_for_job(job, cluster)


def print_submitted(job: Any, run_dir: Path, resources: str) -> None:
    """What was submitted, and how to monitor it."""
    print_line(f"submitted job {job.job_id}: {run_dir}, {resources}")
    print_line(f"monitor with: python -m launch.status {shlex.quote(str(run_dir))}")
    print_line(f"output: {job.paths.stdout.parent}/{job.paths.stdout.name.replace('_0_log', '_TASK_log')}")


if __name__ == "__main__":
    sys.exit(main())
