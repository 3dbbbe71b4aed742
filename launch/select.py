"""Submit a selection: `distil-tl select --submit data.root=FOLDER candidates=... slurm.nodes=2 key=value ...`.

The same as `python -m launch.select`. A copy of the code, the resolved configuration and the batch script go to the
folder of the results. Shortly before its time limit the job is requeued, and resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distil_tl.cli.select import add_options, default_folder, help_of_keys, options_of, read, seconds_of
from distil_tl.config import problems
from distil_tl.selection.config import GridConfig
from distil_tl.utils.args import refuse, to_yaml
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import setup_console
from launch.args import add_job_options, argument_parser, ids_only, print_line, read_slurm, split_slurm
from launch.job import Selection
from launch.one_job import CONFIG, How, Job, refuse_used, submit_job
from launch.preflight import check_submission, without_device

ELSEWHERE = "name another folder with --out"


def main(args: Sequence[str] | None = None) -> int:
    parser = argument_parser("distil-tl select --submit", __doc__)
    parser.epilog = f"{help_of_keys()}\n\n{parser.epilog}"
    add_options(parser)
    add_job_options(parser)
    options, rest = parser.parse_known_args(args)
    with ids_only(options.parsable) as print_id:
        how = How.of(options, print_id)
        return run_command("distil-tl select", lambda: submit(rest, options.out, options.budget, how))


def submit(args: Sequence[str], out: Path | None, budget: str | None, how: How) -> int:
    """Check and submit a selection, or with `how.dry_run` print its batch script. Waits for a local job.

    Returns:
        0, or the exit status of a local job.

    Raises:
        UserError: the selection can't work, or sbatch refuses it. Nothing was submitted.
        WriteError: the job is submitted, but can't be recorded.
    """
    setup_console(True)
    pairs, rest = split_slurm(args)
    slurm = read_slurm(rest, pairs)
    grid, config, unresolved = read(rest)
    seconds_of(budget)
    folder = (out or default_folder(config)).absolute()
    if "%" in str(folder):
        raise UserError(f"--out {folder} contains %, which Slurm replaces in file names; {ELSEWHERE}")
    from distil_tl.cli.selection_checks import (  # imports torch
        example_of_best,
        find_models,
        prefetch_command,
        refuse_none_usable,
        without_models,
    )
    from distil_tl.selection.outcome import check_folder

    check_submission(without_models(config), slurm, how.cluster)
    found = find_models(grid, config)
    refuse_none_usable(found)
    later = example_of_best(config, unresolved, found.usable[0])
    refuse(list(problems(without_device(later) if how.cluster == "slurm" else later, 1)))
    if found.missing:
        print_line(f"the weights of these are not here, and they will be left out:\n{prefetch_command(found.missing)}")
    refuse_used(folder, how, ELSEWHERE)
    if not how.dry_run:
        check_folder(folder)
    task = Selection((str(folder / CONFIG), *texts(grid), *options_of(folder, budget)), str(folder), str(Path.cwd()))
    return submit_job(Job(folder, task, to_yaml(unresolved), slurm, ELSEWHERE), how)


def texts(grid: GridConfig) -> list[str]:
    """The grid as arguments."""
    return [f"{name}={json.dumps(value)}" for name, value in asdict(grid).items()]


if __name__ == "__main__":
    sys.exit(main())
