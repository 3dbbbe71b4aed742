"""A sweep before submission: its file and arguments read, every trial configured and checked, and its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.rundir.changes import NEW_KEYS, earlier_defaults, new_keys, unsafe_changes
from distil_tl.utils.args import flatten, is_file, overlay, plain, read_yaml, to_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic, write_json
from launch.args import load_slurm_section, parse_slurm, split_slurm
from launch.executor import make_private_folder
from launch.job import Training
from launch.local_job import start_recorded
from launch.preflight import check_submission
from launch.records import RECORD_FILE, SWEEP_FILE, read_record, read_sweep_record
from launch.slurm_config import SlurmConfig
from launch.submission import submit_to_slurm
from launch.sweep_file import Sweep, Trial, Values, as_arguments, read_sweep, varied_keys

COMMON_FILE = "common.yaml"  # the configuration that all trials of a sweep share


@dataclass(frozen=True)
class SweepArgs:
    """A sweep file and the arguments beside it.

    Attributes:
        pairs: `key=value` arguments, for all trials.
        folder: holds the run directories of the trials.
    """

    sweep: Sweep
    pairs: list[str]
    folder: Path
    slurm: SlurmConfig


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep.

    Attributes:
        common: the configuration that all trials share.
        trials: by run directory, each with its configuration as YAML.
    """

    sweep: Sweep
    folder: Path
    slurm: SlurmConfig
    common: Any
    trials: dict[Path, tuple[Trial, str]]


def read_sweep_args(program: str, args: Sequence[str], folder: Path | None) -> SweepArgs:
    """Read `SWEEP.yaml [key=value ...] [slurm.key=value ...]`; `folder` is sweeps/NAME by default.

    Raises:
        UserError: the arguments or the file can't be read, or the `slurm` section is invalid.
    """
    files = [arg for arg in args if is_file(arg)]
    if len(files) != 1 or any(arg.startswith("-") for arg in args):
        raise UserError(f"usage: python -m {program} SWEEP.yaml [key=value ...] [slurm.key=value ...]; see --help")
    slurm_pairs, pairs = split_slurm([arg for arg in args if arg != files[0]])
    sweep = read_sweep(Path(files[0]))
    sweep.metric = agree_on_metric(sweep, pairs)
    section = load_slurm_section(Path(files[0]))
    base = load_slurm_section(sweep.config) if sweep.config is not None else None
    if section is None or (isinstance(base, dict) and isinstance(section, dict)):
        section = overlay(base or {}, section or {})
    folder = (folder or Path("sweeps") / sweep.name).absolute()
    return SweepArgs(sweep, pairs, folder, parse_slurm(section, slurm_pairs))


def agree_on_metric(sweep: Sweep, pairs: Sequence[str]) -> str:
    """What ranks the trials and what chooses the best epoch of each: one is the default of the other.

    Raises:
        UserError: they are not the same.
    """
    named = [pair.partition("=")[2] for pair in pairs if pair.startswith("metric=")]
    given = named[-1] if named else sweep.set.get("metric")
    if given is None and sweep.config is not None:
        given = read_yaml(sweep.config).get("metric")
    if sweep.metric and given not in (None, sweep.metric):
        raise UserError(
            f"the sweep ranks its trials by `metric: {sweep.metric}`, but each run chooses its best epoch by "
            f"metric={given}; remove one of them"
        )
    return sweep.metric or str(given or "top1")


def plan_trials(args: SweepArgs, cluster: str, trials: Sequence[Trial]) -> SweepPlan:
    """Configure and check some trials of a sweep.

    Raises:
        UserError: lists the trials that can't work, and why.
    """
    sweep, folder, slurm = args.sweep, args.folder, args.slurm
    varied = varied_keys(trials)
    twice = sorted({pair.partition("=")[0] for pair in args.pairs} & set(varied))
    if twice:
        raise UserError(f"the sweep varies {', '.join(twice)}, and the command line sets it for all trials; remove one")
    config = [str(sweep.config)] if sweep.config is not None else []
    metric = [f"metric={sweep.metric}"] if sweep.metric != "top1" else []
    shared = [*config, *metric, *_older_values(sweep.config, folder), *as_arguments(sweep.set), *args.pairs]
    # The common configuration needs some data.root, though no trial uses it.
    images = ["data.root=null"] if "data.root" in varied else []
    common = configuration.load([*shared, *images, f"run_dir={folder}"])[1]
    planned: dict[Path, tuple[Trial, str]] = {}
    problems: dict[str, list[str]] = {}
    for trial in trials:
        run_dir = folder / trial.name
        try:
            trial_config, source = configuration.load([*shared, *trial.arguments, f"run_dir={run_dir}"])
            check_submission(trial_config, slurm, cluster)
        except UserError as error:
            problems.setdefault(str(error), []).append(" ".join(trial.arguments) or trial.name)
            continue
        planned[run_dir] = trial, _trial_yaml(trial_config, source, trial, sweep.name)
    if problems:
        count = sum(map(len, problems.values()))
        shown = [f"{error}\n  {_first_three(names)}" for error, names in problems.items()]
        raise UserError(f"{count} of {count + len(planned)} trials can't work: " + "\n".join(shown))
    return SweepPlan(sweep, folder, slurm, common, planned)


def _saved_common(folder: Path) -> dict[str, Any] | None:
    """The common configuration of the trials that were submitted before; None if there are none."""
    saved = folder / COMMON_FILE
    if not saved.exists() or not any(folder.glob(f"*/{RECORD_FILE}")):
        return None
    common: Any = OmegaConf.to_container(OmegaConf.load(saved), resolve=False)
    return common if isinstance(common, dict) else None


def _older_values(config: Path | None, folder: Path) -> list[str]:
    """`key=value` for keys and defaults newer than the sweep in `folder`: new trials train like those that it has."""
    saved = _saved_common(folder)
    if saved is None:
        return []
    then, given = flatten(saved), flatten(read_yaml(config)).keys() if config is not None else set()
    older = {key: value for key, value in new_keys(saved.get("stages") or {}).items() if key not in then.keys() | given}
    older |= earlier_defaults(then, given)
    return as_arguments({**older, "metric": saved.get("metric", NEW_KEYS["metric"])})


def _trial_yaml(config: Config, source: DictConfig, trial: Trial, sweep: str) -> str:
    """The configuration that a trial's job trains."""
    if config.tracking.wandb.group is None:
        source.tracking.wandb.group = sweep
    if config.tracking.wandb.name is None:
        source.tracking.wandb.name = " ".join(trial.arguments) or trial.name
    if config.resume == "never":  # the folder is the trial's own, and a requeued job must resume from its checkpoints
        source.resume = "auto"
    return to_yaml(source)


def _first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"in {'; '.join(names[:3])}{more}"


def refuse_other_common(plan: SweepPlan) -> None:
    """Check that the common configuration is that of the trials already submitted: it is not part of their names.

    Raises:
        UserError: lists the keys that differ.
    """
    before = _saved_common(plan.folder)
    if before is None:
        return
    now = plain(plan.common)
    changes = unsafe_changes(before, now, list(before.get("stages") or {}))
    if changes:
        listing = "\n".join(f"  - {change}" for change in changes)
        raise UserError(
            f"{plan.folder} holds trials with another common configuration:\n{listing}\nUse the earlier values, or "
            f"another --dir."
        )


def save_plan(plan: SweepPlan, trials: dict[str, Values] | None = None) -> None:
    """Write common.yaml, which the next submission is compared with, and sweep.json, which `launch.status` reads.

    Args:
        trials: values by trial name, if not those of the plan.
    """
    make_private_folder(plan.folder / "slurm")
    write_atomic(plan.folder / COMMON_FILE, to_yaml(plan.common))
    if trials is None:
        trials = {run_dir.name: trial.values for run_dir, (trial, _) in plan.trials.items()}
    before = read_sweep_record(plan.folder) or {}
    earlier = {
        name: values
        for name, values in {**before.get("earlier", {}), **before.get("trials", {})}.items()
        if name not in trials and read_record(plan.folder / name) is not None
    }
    record = {"name": plan.sweep.name, "metric": plan.sweep.metric, "trials": trials, "earlier": earlier}
    write_json(plan.folder / SWEEP_FILE, record)


def submit_trials(plan: SweepPlan, executor: Any, run_dirs: Sequence[Path], cluster: str, lock: int) -> list[Any]:
    """Submit the trials of these run directories, several as one array, or start one here. Returns submitit's jobs.

    Args:
        lock: descriptor of the submission lock of the sweep.

    Raises:
        UserError: sbatch refused them.
        WriteError: they are submitted, but not all are recorded.
        OSError: the folder can't be written, and nothing is submitted.
    """
    tasks = []
    for run_dir in run_dirs:
        path = run_dir / "slurm" / "config.yaml"
        make_private_folder(path.parent)
        write_atomic(path, plan.trials[run_dir][1])
        tasks.append(Training(str(path), str(Path.cwd())))
    if cluster == "slurm":
        return submit_to_slurm(executor, plan.folder, run_dirs, tasks, lock)
    ((run_dir,), (task,)) = run_dirs, tasks
    return [start_recorded(executor, run_dir, task, cluster)]
