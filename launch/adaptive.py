"""Search by Optuna: `python -m launch.adaptive SWEEP.yaml --trials 50 --parallel 8 [key=value ...]`.

The space is the sweep's `random`. Trials are jobs like those of launch.sweep; this process proposes them, watches their
evaluations, and ends the weak ones early. It may be stopped and started again: everything is in SWEEP_DIR.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distil_tl.rundir.lock import Attempt, is_alive, read_attempt
from distil_tl.utils.args import read_yaml, refuse, to_yaml
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic
from distil_tl.utils.log import setup_console
from launch import args as options
from launch.args import say
from launch.snapshot import snapshot_path, take_snapshot
from launch.submit import CLUSTERS, make_private
from launch.sweep import Spec, make_plan, read_spec, refuse_other_sweep
from launch.sweep_file import Sweep, Trial

CLAIM = "search.json"  # of the process that searches
POLL_S = {"slurm": 15.0, "local": 2.0}


def main(args: Sequence[str] | None = None) -> int:
    parser = options.argument_parser("python -m launch.adaptive", __doc__)
    parser.add_argument("--dir", type=Path, help="where the trials go; sweeps/NAME if not given")
    parser.add_argument("--trials", type=int, help="how many in all; the sweep's `count` if not given")
    parser.add_argument("--parallel", type=int, default=4, help="how many are jobs at a time")
    parser.add_argument("--cluster", choices=CLUSTERS[:2], default="slurm", help="local: on this machine")
    parser.add_argument("--poll", type=float, metavar="SECONDS", help="between two looks at the trials")
    parser.add_argument("--new-code", action="store_true", help="go on with the code as it is now")
    known, rest = parser.parse_known_args(args)
    return run_command("launch.adaptive", lambda: search(rest, **vars(known)))


def search(
    args: Sequence[str],
    dir: Path | None,
    trials: int | None,
    parallel: int,
    cluster: str,
    poll: float | None,
    new_code: bool,
) -> int:
    """Propose and watch trials until there are as many as asked for, and say which was best. The exit status.

    Raises:
        UserError: the sweep has no `random`, its trials can't work, or the folder is another search's.
    """
    setup_console(True)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("launch.adaptive needs Optuna: pip install 'distil_tl[optuna]'") from None
    from launch.optuna_driver import Driver, open_study

    spec = read_spec("launch.adaptive", args, dir)
    wanted = trials if trials is not None else spec.sweep.count or 0
    poll = poll if poll is not None else POLL_S[cluster]
    refuse(list(_problems(spec.sweep, wanted, parallel, poll)))
    plan = make_plan(spec, cluster, corners(spec.sweep))
    refuse_other_sweep(plan)
    refuse_other_search(spec.folder)
    make_private(spec.folder / "slurm")
    claim = Attempt(spec.folder, CLAIM)
    claim.begin(0, {})
    try:
        study = open_study(spec.sweep, spec.folder)
        code = code_of(study, spec.folder, new=new_code)
        return Driver(study, keep(spec), plan, code, cluster, claim).run(wanted, parallel, poll)
    finally:
        claim.end()


def _problems(sweep: Sweep, wanted: int, parallel: int, poll: float) -> list[str]:
    others = [name for name in ("trials", "grid", "seeds") if getattr(sweep, name)]
    found = []
    if not sweep.random:
        found.append("the sweep has no `random`, which is the space to search")
    if "seed" in sweep.set:
        found.append("set: each trial has a `seed` of its own, counted from the sweep's; set that, beside `random`")
    if others:
        found.append(f"the search is of `random` alone; leave out `{'` and `'.join(others)}`, or use launch.sweep")
    if sweep.random and wanted < 1:
        found.append("--trials must be at least 1")
    if wanted > sweep.max_trials:
        found.append(f"--trials {wanted} is more than max_trials={sweep.max_trials}; ask for less, or raise it")
    if parallel < 1:
        found.append("--parallel must be at least 1")
    if poll < 0:
        found.append("--poll must be at least 0")
    return found


def corners(sweep: Sweep) -> list[Trial]:
    """Trials with each choice and each bound of the space, to be checked before any is proposed."""
    spaces = {key: next(iter(how.values())) for key, how in sweep.random.items()}
    most = max(map(len, spaces.values()))
    return [
        Trial({**{key: values[i % len(values)] for key, values in spaces.items()}, "seed": sweep.seed})
        for i in range(most)
    ]


def refuse_other_search(folder: Path) -> None:
    """Refuse a folder that a process of this machine searches; one of another machine ends when it is replaced."""
    other = read_attempt(folder / CLAIM)
    if other is not None and "ended_at" not in other and is_alive(other):
        raise UserError(
            f"process {other['pid']} of this machine has been searching in {folder} since {other['started_at']}; wait "
            f"for it, end it with `kill {other['pid']}`, or give another --dir"
        )


def code_of(study: Any, folder: Path, *, new: bool) -> Path:
    """The code that all trials run, those of a search that goes on too, as they are compared with each other."""
    own = folder / "code" / str(study.user_attrs.get("code"))
    if own.is_dir() and not new:
        if own != snapshot_path(folder):
            say(f"the code was edited since this search began, and it goes on with its own, {own}; else: --new-code")
        return own
    code = take_snapshot(folder)
    study.set_user_attr("code", code.name)
    return code


def keep(spec: Spec) -> Spec:
    """A sweep that edits of its configuration no longer reach."""
    if spec.sweep.config is None:
        return spec
    copy = spec.folder / "slurm" / "search.yaml"
    write_atomic(copy, to_yaml(OmegaConf.create(read_yaml(spec.sweep.config, ()))))
    return dataclasses.replace(spec, sweep=dataclasses.replace(spec.sweep, config=copy))


if __name__ == "__main__":
    sys.exit(main())
