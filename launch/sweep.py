"""Submit a sweep: `python -m launch.sweep SWEEP.yaml [key=value ...]`, one Slurm array of trainings.

Each trial trains in SWEEP_DIR/NAME, named by a hash of what it sets. The same command again submits what is missing.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distil_tl import config as configuration
from distil_tl.config import Config, unsafe_changes
from distil_tl.utils.args import is_file, overlay, plain, to_yaml
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError
from distil_tl.utils.files import write_atomic, write_json
from distil_tl.utils.log import setup_console
from launch import args as options
from launch.args import say
from launch.job import Training
from launch.records import RECORD, SWEEP, read_record, read_sweep_record, record
from launch.run_status import Standing, stand
from launch.slurm_config import SlurmConfig
from launch.snapshot import take_snapshot
from launch.squeue import QueuedJob, SlurmUnavailableError, queued
from launch.submit import CLUSTERS, describe, executor_for, make_private, preflight, script, start, wait_here
from launch.sweep_file import Sweep, Trial, Values, as_arguments, read_sweep, same_keys

COMMON = "common.yaml"


def main(args: Sequence[str] | None = None) -> int:
    parser = options.argument_parser("python -m launch.sweep", __doc__)
    parser.add_argument("--dir", type=Path, help="where the trials go; sweeps/NAME if not given")
    parser.add_argument("--cluster", choices=CLUSTERS[:2], default="slurm", help="local: one after the other, here")
    parser.add_argument("--resubmit-failed", action="store_true", help="also what failed, from its last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and print the script for sbatch")
    known, rest = parser.parse_known_args(args)
    return run_command("launch.sweep", lambda: submit_sweep(rest, **vars(known)))


@dataclass(frozen=True)
class Spec:
    """A sweep as it is asked for: `given` are `key=value` of the command line, for all its trials."""

    sweep: Sweep
    given: list[str]
    folder: Path
    slurm: SlurmConfig


@dataclass(frozen=True)
class Plan:
    """A sweep as it will run: every trial with the configuration to train, as YAML."""

    sweep: Sweep
    folder: Path
    slurm: SlurmConfig
    common: Any
    trials: dict[Path, tuple[Trial, str]]


def submit_sweep(args: Sequence[str], dir: Path | None, cluster: str, resubmit_failed: bool, dry_run: bool) -> int:
    """Check all trials, and submit those that are not done, under way or failed. The exit status, of trials run here.

    Raises:
        UserError: when one of them can't work, or sbatch refuses them. Nothing was submitted then.
    """
    setup_console(True)
    spec = read_spec("launch.sweep", args, dir)
    plan = make_plan(spec, cluster, spec.sweep.all_trials())
    refuse_other_sweep(plan)
    before = [found for run_dir in plan.trials if (found := read_record(run_dir)) is not None]
    queue = queue_or_none() if "slurm" in {cluster, *(found["cluster"] for found in before)} else {}
    standings = {run_dir: stand(run_dir, queue) for run_dir in plan.trials}
    wanted = {"missing", "stopped", *(["failed"] if resubmit_failed else [])}
    todo = [run_dir for run_dir, standing in standings.items() if standing.state in wanted]
    if dry_run:
        for run_dir, (trial, _) in plan.trials.items():
            said = "would be submitted" if run_dir in todo else standings[run_dir].state
            say(f"{run_dir.name}  {' '.join(trial.arguments)}  {said}")
        if cluster == "slurm" and todo:
            say(script(plan.folder, plan.slurm, cluster, name=plan.sweep.name, tasks=len(todo)))
        return 0
    say_left_alone(standings, todo, resubmit_failed)
    write_down(plan)
    if not todo:
        say(f"nothing to submit; python -m launch.status {shlex.quote(str(plan.folder))}")
        return 0
    executor = executor_for(plan.folder, take_snapshot(plan.folder), plan.slurm, cluster, name=plan.sweep.name)
    status = 0
    if cluster == "slurm":
        jobs = launch_trials(plan, executor, todo, cluster)
        one, at_once = jobs[0].job_id.partition("_")[0], plan.slurm.array_parallelism
        say(f"job {one}: {len(jobs)} trials, each on {describe(plan.slurm, cluster)}, {at_once} at once")
    else:
        status = run_here(plan, executor, todo)
    say(f"look after it: python -m launch.status {shlex.quote(str(plan.folder))}")
    return status


def read_spec(program: str, args: Sequence[str], folder: Path | None) -> Spec:
    """What `SWEEP.yaml [key=value ...] [slurm.key=value ...]` means.

    Raises:
        UserError: the arguments or the file can't be read, or say something impossible of `slurm`.
    """
    files = [arg for arg in args if is_file(arg)]
    if len(files) != 1 or any(arg.startswith("-") for arg in args):
        raise UserError(f"usage: python -m {program} SWEEP.yaml [key=value ...] [slurm.key=value ...]; see --help")
    sweep = read_sweep(Path(files[0]))
    pairs, rest = options.split([arg for arg in args if arg != files[0]])
    tree = options.slurm_section(Path(files[0]))
    below = options.slurm_section(sweep.config) if sweep.config is not None else None
    if tree is None or (isinstance(below, dict) and isinstance(tree, dict)):
        tree = overlay(below or {}, tree or {})
    folder = (folder or Path("sweeps") / sweep.name).absolute()
    return Spec(sweep, rest, folder, options.read_slurm(tree, pairs))


def make_plan(spec: Spec, cluster: str, trying: Sequence[Trial]) -> Plan:
    """What some trials of a sweep will be, all of them checked.

    Raises:
        UserError: some can't work, and which.
    """
    sweep, folder, slurm = spec.sweep, spec.folder, spec.slurm
    varied = same_keys(trying)
    twice = sorted({arg.partition("=")[0] for arg in spec.given} & set(varied))
    if twice:
        raise UserError(f"for all trials there is a value of {', '.join(twice)}, which the sweep varies; leave out one")
    config = [str(sweep.config)] if sweep.config is not None else []
    shared = [*config, *as_arguments(sweep.set), *spec.given]
    # No trial trains on it; it is only what they have in common.
    images = ["data.root=null"] if "data.root" in varied else []
    common = configuration.load([*shared, *images, f"run_dir={folder}"])[1]
    trials: dict[Path, tuple[Trial, str]] = {}
    problems: dict[str, list[str]] = {}
    for trial in trying:
        run_dir = folder / trial.name
        try:
            one, source = configuration.load([*shared, *trial.arguments, f"run_dir={run_dir}"])
            preflight(one, slurm, cluster)
        except UserError as error:
            problems.setdefault(str(error), []).append(" ".join(trial.arguments) or trial.name)
            continue
        trials[run_dir] = trial, _to_train(one, source, trial, sweep.name)
    if problems:
        count = sum(map(len, problems.values()))
        shown = [f"{error}\n  {_some(which)}" for error, which in problems.items()]
        raise UserError(f"{count} of {count + len(trials)} trials can't work: " + "\n".join(shown))
    return Plan(sweep, folder, slurm, common, trials)


def _to_train(config: Config, source: DictConfig, trial: Trial, sweep: str) -> str:
    """A trial's configuration as YAML."""
    if config.tracking.wandb.group is None:
        source.tracking.wandb.group = sweep
    if config.tracking.wandb.name is None:
        source.tracking.wandb.name = " ".join(trial.arguments) or trial.name
    if config.resume == "never":  # as nobody else trains in its folder, where it goes on when it is requeued
        source.resume = "auto"
    return to_yaml(source)


def _some(which: list[str]) -> str:
    more = f" and {len(which) - 3} more" if len(which) > 3 else ""
    return f"in {'; '.join(which[:3])}{more}"


def refuse_other_sweep(plan: Plan) -> None:
    """Trials are told apart by what they set, so all that they share must stay."""
    saved = plan.folder / COMMON
    if not saved.exists() or not any(plan.folder.glob(f"*/{RECORD}")):  # none was ever submitted
        return
    before: Any = OmegaConf.to_container(OmegaConf.load(saved), resolve=False)
    now = plain(plan.common)
    stages = list(before.get("stages") or {})
    changes = unsafe_changes(before, now, stages)
    if changes:
        listing = "\n".join(f"  - {change}" for change in changes)
        raise UserError(
            f"{plan.folder} holds trials of another common configuration:\n{listing}\nGo back to its values, or give "
            f"another --dir."
        )


def queue_or_none() -> dict[str, QueuedJob] | None:
    try:
        return queued()
    except SlurmUnavailableError as error:
        sys.stderr.write(f"launch: {error}: how jobs stand is told from their files alone\n")
        return None


def say_left_alone(standings: dict[Path, Standing], todo: list[Path], resubmit_failed: bool) -> None:
    left = Counter(standing.state for run_dir, standing in standings.items() if run_dir not in todo)
    if left:
        say(f"left alone: {', '.join(f'{count} {state}' for state, count in sorted(left.items()))}")
    if left["failed"] and not resubmit_failed:
        say("those that failed go on with --resubmit-failed")


def write_down(plan: Plan, trials: dict[str, Values] | None = None) -> None:
    """What `launch.status` shows, and what the next submission is held to."""
    make_private(plan.folder / "slurm")
    write_atomic(plan.folder / COMMON, to_yaml(plan.common))
    if trials is None:
        trials = {run_dir.name: trial.values for run_dir, (trial, _) in plan.trials.items()}
    before = read_sweep_record(plan.folder) or {}
    earlier = {
        name: values
        for name, values in {**before.get("earlier", {}), **before.get("trials", {})}.items()
        if name not in trials and read_record(plan.folder / name) is not None
    }
    found = {"name": plan.sweep.name, "metric": plan.sweep.metric, "trials": trials, "earlier": earlier}
    write_json(plan.folder / SWEEP, found)


def launch_trials(plan: Plan, executor: Any, todo: Sequence[Path], cluster: str) -> list[Any]:
    """Hand trials over to submitit, several as one array."""
    work = []
    for run_dir in todo:
        path = run_dir / "slurm" / "config.yaml"
        make_private(path.parent)
        write_atomic(path, plan.trials[run_dir][1])
        work.append(Training(str(path), str(Path.cwd())))
    jobs = start(executor, work)
    for run_dir in todo:
        (run_dir / "summary.json").unlink(missing_ok=True)  # it stands for an attempt that is over
    for run_dir, job in zip(todo, jobs, strict=True):
        record(run_dir, job.job_id, cluster)
    return jobs


def run_here(plan: Plan, executor: Any, todo: Sequence[Path]) -> int:
    """One trial after the other, as this machine is one. The exit status: a fault when any failed."""
    failed = 0
    for number, run_dir in enumerate(todo, start=1):
        say(f"trial {number} of {len(todo)}: {run_dir}")
        (job,) = launch_trials(plan, executor, [run_dir], "local")
        status = wait_here(job, "local")
        if status == EXIT_PREEMPTED:
            return status
        failed += status != 0
    if failed:
        say(f"{failed} of {len(todo)} failed")
    return EXIT_FAULT if failed else 0


if __name__ == "__main__":
    sys.exit(main())
