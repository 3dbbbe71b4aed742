"""Adaptive search with Optuna: `python -m launch.adaptive SWEEP.yaml --trials 50 --parallel 8 [key=value ...]`.

The search space is the sweep's `random`. Trials are jobs as in launch.sweep. This process proposes them, reads their
evaluations and stops weak trials early. All its state is in SWEEP_DIR, so it can be stopped and restarted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distil_tl.rundir.lock import Attempt
from distil_tl.utils.args import read_yaml, refuse, to_yaml
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError, WriteError
from distil_tl.utils.files import write_atomic
from distil_tl.utils.home import path_argument
from distil_tl.utils.import_path import is_installed
from distil_tl.utils.log import setup_console
from launch.args import CLUSTERS, add_submission_options, argument_parser, print_line, seconds
from launch.executor import sbatch_script
from launch.search_lock import LOCK_FILE, refuse_other_search
from launch.snapshot import snapshot_path, take_snapshot
from launch.submission import nothing_submitted, submitting
from launch.sweep_file import Sweep, Trial
from launch.sweep_plan import SweepArgs, plan_trials, read_sweep_args, refuse_other_common
from launch.test_only import refuse_impossible

POLL_S = {"slurm": 15.0, "local": 2.0}


def main(args: Sequence[str] | None = None) -> int:
    parser = argument_parser("python -m launch.adaptive", __doc__)
    parser.add_argument(
        "--dir", type=path_argument, help="folder for the run directories of the trials (default: sweeps/NAME)"
    )
    parser.add_argument("--trials", type=int, help="total number of trials (default: the sweep's `count`)")
    parser.add_argument("--parallel", type=int, default=4, help="maximum number of jobs at a time (default: 4)")
    parser.add_argument("--cluster", choices=CLUSTERS[:2], default="slurm", help="local: processes of this machine")
    parser.add_argument(
        "--poll", type=seconds, metavar="SECONDS", help="time between two checks of the trials (default: 15, local 2)"
    )
    add_submission_options(parser, parsable=False)
    parser.add_argument("--new-code", action="store_true", help="run new trials with the current code")
    options, rest = parser.parse_known_args(args)
    return run_command("launch.adaptive", lambda: search(rest, **vars(options)))


def search(
    args: Sequence[str],
    dir: Path | None,
    trials: int | None,
    parallel: int,
    cluster: str,
    poll: float | None,
    new_code: bool,
    no_test: bool,
) -> int:
    """Propose and monitor trials until the wanted number has ended, and print the best. Returns the exit status.

    Args:
        dir: holds the run directories of the trials; sweeps/NAME if None.
        trials: in total, with those of earlier calls; the sweep's `count` if None.
        parallel: maximum number of jobs at a time.
        cluster: slurm or local.
        poll: seconds between two checks of the trials.
        new_code: further trials of an earlier search run the current code.
        no_test: does not ask Slurm first whether it could run the jobs.

    Raises:
        UserError: the sweep has no `random`, its trials can't work, or the folder holds another search.
    """
    setup_console(True)
    sweep_args = read_sweep_args("launch.adaptive", args, dir)
    sweep, folder = sweep_args.sweep, sweep_args.folder
    wanted = trials if trials is not None else sweep.count or 0
    poll = poll if poll is not None else POLL_S[cluster]
    refuse(list(_problems(sweep, wanted, parallel)))
    if not is_installed("optuna"):
        raise UserError("launch.adaptive needs Optuna: pip install 'distil_tl[optuna]'")
    plan = plan_trials(sweep_args, cluster, boundary_trials(sweep))
    refuse_other_common(plan)
    refuse_other_search(folder)
    if cluster == "slurm" and not no_test:
        refuse_impossible(sbatch_script(folder, plan.slurm, cluster, name=sweep.name), plan.slurm)
    from launch.optuna_driver import Driver
    from launch.optuna_study import open_study

    lock = Attempt(folder, LOCK_FILE)
    with submitting(folder):
        refuse_other_common(plan)
        refuse_other_search(folder)
        lock.begin(0, {})
    with ended(lock):
        with nothing_submitted(folder):
            study = open_study(sweep, folder)
            code = choose_code(study, folder, new=new_code)
            driver = Driver(study, copy_config(sweep_args), plan, code, cluster, lock)
        with writing_records(folder):
            return driver.run(wanted, parallel, poll)


@contextmanager
def ended(lock: Attempt) -> Iterator[None]:
    """Release the search's lock at the end, as far as it can be written."""
    try:
        yield
    finally:
        with suppress(OSError):
            lock.end()


@contextmanager
def writing_records(folder: Path) -> Iterator[None]:
    """Turn an error of writing during a search into a WriteError."""
    try:
        yield
    except (WriteError, BrokenPipeError):
        raise
    except OSError as error:
        raise WriteError(
            f"can't write in {folder}: {error.strerror or error}. The jobs of the trials continue; free some "
            f"space, and run the same command to resume"
        ) from error


def _problems(sweep: Sweep, wanted: int, parallel: int) -> Iterator[str]:
    others = [name for name in ("trials", "grid", "seeds") if getattr(sweep, name)]
    if not sweep.random:
        yield "the sweep has no `random`, which is the search space"
    if "seed" in sweep.set:
        yield "set: remove `seed`; each trial has its own, counted from the sweep's `seed`, which is beside `random`"
    if others:
        yield f"launch.adaptive searches in `random` only; remove `{'` and `'.join(others)}`, or use launch.sweep"
    if sweep.random and wanted < 1:
        yield "--trials must be at least 1" + ("" if sweep.count else "; without it the sweep needs `count`")
    if wanted > sweep.max_trials:
        yield f"--trials {wanted} is more than max_trials={sweep.max_trials}; use a smaller number, or raise max_trials"
    if parallel < 1:
        yield "--parallel must be at least 1"


def boundary_trials(sweep: Sweep) -> list[Trial]:
    """Trials with every choice and both bounds of each key, to check the search space before the search begins."""
    spaces = {key: next(iter(distribution.values())) for key, distribution in sweep.random.items()}
    count = max(map(len, spaces.values()))
    return [
        Trial({**{key: values[i % len(values)] for key, values in spaces.items()}, "seed": sweep.seed})
        for i in range(count)
    ]


def choose_code(study: Any, folder: Path, *, new: bool) -> Path:
    """The code snapshot that trials run. A resumed search keeps its own, as its trials are compared with each other.

    Args:
        new: takes a new snapshot of the current code.
    """
    own = folder / "code" / str(study.user_attrs.get("code"))
    if own.is_dir() and not new:
        if own != snapshot_path(folder):
            print_line(
                f"the code has changed since this search began; trials still run the copy in {own} (to use the current "
                f"code, add --new-code)"
            )
        return own
    code = take_snapshot(folder)
    study.set_user_attr("code", code.name)
    return code


def copy_config(args: SweepArgs) -> SweepArgs:
    """Copy the sweep's configuration to the folder, so that later edits of the file do not change running searches."""
    if args.sweep.config is None:
        return args
    copy = args.folder / "slurm" / "search.yaml"
    write_atomic(copy, to_yaml(OmegaConf.create(read_yaml(args.sweep.config))))
    return dataclasses.replace(args, sweep=dataclasses.replace(args.sweep, config=copy))


if __name__ == "__main__":
    sys.exit(main())
