"""Search by Optuna: `python -m launch.adaptive SWEEP.yaml --trials 50 --parallel 8 [key=value ...]`.

The space is the sweep's `random`. Trials are jobs like those of launch.sweep; this process proposes them, watches their
evaluations, and ends the weak ones early. It may be stopped and started again: everything is in SWEEP_DIR.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distil_tl.commands import run_command
from distil_tl.errors import UserError
from distil_tl.files import write_json
from distil_tl.log import setup_console
from launch.options import say
from launch.queue import QueuedJob, SlurmUnavailableError, cancel, queued
from launch.records import read_record
from launch.snapshot import take_snapshot
from launch.states import evaluations, stand
from launch.status import OVER
from launch.submit import CLUSTERS, executor_for, stop_here
from launch.sweep import Plan, launch_trials, make_plan, refuse_other_sweep, write_down
from launch.trials import Trial, Values, draw_value

STORAGE = "optuna.log"
PRUNED = "pruned.json"
POLL_S = 15.0


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.adaptive", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where the trials go; sweeps/NAME if not given")
    parser.add_argument("--trials", type=int, help="how many in all; the sweep's `count` if not given")
    parser.add_argument("--parallel", type=int, default=4, help="how many are jobs at a time")
    parser.add_argument("--cluster", choices=CLUSTERS[:2], default="slurm", help="local: on this machine")
    parser.add_argument("--poll", type=float, default=POLL_S, metavar="SECONDS", help="between two looks at the trials")
    known, rest = parser.parse_known_args(args)
    return run_command("launch.adaptive", lambda: search(rest, **vars(known)))


def search(
    args: Sequence[str],
    dir: Path | None,
    trials: int | None,
    parallel: int,
    cluster: str,
    poll: float,
) -> None:
    """Propose and watch trials until there are as many as asked for, and say which was best.

    Raises:
        UserError: the sweep has no `random`, or its trials can't work.
    """
    setup_console(True)
    optuna = _import_optuna()
    files = [arg for arg in args if not arg.startswith("-") and "=" not in arg]
    if len(files) != 1 or any(arg.startswith("-") for arg in args):
        raise UserError("usage: python -m launch.adaptive SWEEP.yaml [key=value ...] [slurm.key=value ...]; see --help")
    rest = [arg for arg in args if arg != files[0]]
    plan = make_plan(Path(files[0]), rest, dir, cluster, only=[])
    if not plan.sweep.random:
        raise UserError(f"{files[0]} has no `random`, which is the space to search")
    refuse_other_sweep(plan)
    write_down(plan)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(plan.folder / STORAGE))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=plan.sweep.name,
        direction="minimize" if plan.sweep.metric == "loss" else "maximize",
        sampler=optuna.samplers.TPESampler(seed=plan.sweep.seed, multivariate=True, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        load_if_exists=True,
    )
    wanted = trials or plan.sweep.count or 0
    driver = Driver(
        optuna, study, plan, cluster, lambda trial: make_plan(Path(files[0]), rest, dir, cluster, only=[trial])
    )
    driver.run(wanted, parallel, poll)


class Driver:
    """Keeps as many trials under way as it may, and Optuna told of how they do."""

    def __init__(self, optuna: Any, study: Any, plan: Plan, cluster: str, plan_of: Callable[[Trial], Plan]) -> None:
        self.optuna, self.study, self.plan, self.cluster, self.plan_of = optuna, study, plan, cluster, plan_of
        self.code = take_snapshot(plan.folder)  # once: trials of a search are compared with each other
        self.jobs: dict[str, Any] = {}  # of this machine, by run directory's name
        self.values: dict[str, Values] = {}
        self.reported: Counter[str] = Counter()  # evaluations
        running = optuna.trial.TrialState.RUNNING
        self.under_way = {
            trial.user_attrs["name"]: optuna.trial.Trial(study, trial._trial_id)
            for trial in study.get_trials(states=(running,))
            if "name" in trial.user_attrs
        }
        for trial in study.get_trials(deepcopy=False):
            if "name" in trial.user_attrs:
                self.values[trial.user_attrs["name"]] = trial.user_attrs["values"]
                self.reported[trial.user_attrs["name"]] = len(trial.intermediate_values)

    def run(self, wanted: int, parallel: int, poll: float) -> None:
        begun = len(self.values)
        while self.under_way or begun < wanted:
            while begun < wanted and len(self.under_way) < parallel:
                self.propose()
                begun += 1
            self.note()
            queue = self.ask()
            for name in list(self.under_way):
                self.look(name, queue)
            if self.under_way:
                time.sleep(poll)
        self.say_best()

    def propose(self) -> None:
        """Submit a trial that Optuna suggests."""
        asked = self.study.ask()
        values = {key: draw_value(_Suggest(asked, key), how) for key, how in self.plan.sweep.random.items()}
        trial = Trial({**values, "seed": self.plan.sweep.seed + asked.number})  # two alike are still two
        asked.set_user_attr("values", trial.values)
        plan = self.plan_of(trial)
        ((run_dir, _),) = plan.trials.items()
        executor = executor_for(plan.folder, self.code, plan.slurm, self.cluster, name=plan.sweep.name)
        (job,) = launch_trials(plan, executor, [run_dir], self.cluster)
        asked.set_user_attr("name", run_dir.name)
        self.jobs[run_dir.name], self.under_way[run_dir.name] = job, asked
        self.values[run_dir.name] = trial.values
        say(f"trial {asked.number}, job {job.job_id}: {' '.join(trial.arguments)}")

    def look(self, name: str, queue: dict[str, QueuedJob] | None) -> None:
        """Tell Optuna of new evaluations, and of an end."""
        run_dir, trial, metric = self.plan.folder / name, self.under_way[name], self.plan.sweep.metric
        standing = stand(run_dir, queue)
        for number, line in list(enumerate(evaluations(run_dir)))[self.reported[name] :]:
            if line.get(metric) is not None:
                trial.report(line[metric], number)
            self.reported[name] = number + 1
        states = self.optuna.trial.TrialState
        if standing.state == "completed":
            assert standing.best is not None
            self.tell(name, standing.best[metric])
        elif standing.state in OVER:
            self.tell(name, None, states.PRUNED if standing.state == "pruned" else states.FAIL)
        elif standing.state == "running" and trial.should_prune():
            write_json(run_dir / PRUNED, {"after": standing.epoch, "stage": standing.stage})
            self.end(name)
            self.tell(name, None, states.PRUNED)

    def tell(self, name: str, value: float | None, state: Any = None) -> None:
        trial = self.under_way.pop(name)
        self.study.tell(trial, value, state=state)
        say(f"trial {trial.number}: {f'{value:.4f}' if value is not None else state.name.lower()}")

    def end(self, name: str) -> None:
        record = read_record(self.plan.folder / name)
        if self.cluster == "slurm" and record is not None:
            cancel([str(record["job_id"])])
        elif name in self.jobs:
            stop_here(self.jobs[name])

    def ask(self) -> dict[str, QueuedJob] | None:
        if self.cluster != "slurm":
            return {}
        try:
            return queued()
        except SlurmUnavailableError as error:
            sys.stderr.write(f"launch: {error}; asking again later\n")
            return None

    def note(self) -> None:
        write_down(self.plan, self.values)

    def say_best(self) -> None:
        done = self.study.get_trials(states=(self.optuna.trial.TrialState.COMPLETE,))
        if done:
            best = self.study.best_trial
            values = " ".join(Trial(best.user_attrs["values"]).arguments)
            say(f"best: {self.plan.sweep.metric} {best.value:.4f} of trial {best.number}: {values}")
        say(f"all of them: python -m launch.status {shlex.quote(str(self.plan.folder))}")


class _Suggest:
    """Optuna in the place of a random number generator, for `draw_value`."""

    def __init__(self, trial: Any, key: str) -> None:
        self.trial, self.key = trial, key

    def choice(self, values: list[Any]) -> Any:
        return values[self.trial.suggest_categorical(self.key, list(range(len(values))))]

    def uniform(self, low: float, high: float) -> float:
        found: float = self.trial.suggest_float(self.key, low, high)
        return found


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("launch.adaptive needs Optuna: pip install 'distil_tl[optuna]'") from None
    return optuna


if __name__ == "__main__":
    sys.exit(main())
