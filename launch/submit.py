"""Submit a run: `python -m launch.submit CONFIG.yaml slurm.nodes=2 slurm.gpus_per_node=8 key=value ...`.

A copy of the code, the resolved configuration and the batch script go to RUN_DIR. Shortly before its time limit the job
saves and is requeued, until training is complete.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distil_tl.utils.args import to_yaml
from distil_tl.utils.command import run_command
from distil_tl.utils.log import setup_console
from launch.args import add_job_options, argument_parser, ids_only, print_line, read_run
from launch.job import Training
from launch.one_job import CONFIG, How, Job, refuse_used, submit_job
from launch.preflight import check_submission


def main(args: Sequence[str] | None = None) -> int:
    parser = argument_parser("python -m launch.submit", __doc__)
    add_job_options(parser)
    options, rest = parser.parse_known_args(args)
    with ids_only(options.parsable) as print_id:
        return run_command("launch.submit", lambda: submit(rest, How.of(options, print_id)))


def submit(args: Sequence[str], how: How) -> int:
    """Check and submit a run, or with `how.dry_run` print its batch script. Waits for a local job.

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
    check_submission(config, slurm, how.cluster)
    refuse_used(run_dir, how, "choose another run_dir")
    if look_for_start(asdict(config), unresolved).completed and not how.dry_run:
        print_line(f"the run in {run_dir} is already completed; for another run change seed or run_dir")
        return 0
    if config.resume == "never":  # is checked above; a requeued job must resume from its own checkpoints
        unresolved.resume = "auto"
    task = Training(str(run_dir / CONFIG), str(Path.cwd()))
    return submit_job(Job(run_dir, task, to_yaml(unresolved), slurm, "choose another run_dir"), how)


if __name__ == "__main__":
    sys.exit(main())
