"""What a search does: trials under way as jobs, and Optuna told how they do. Needs Optuna."""

from __future__ import annotations

import random
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna

from distil_tl.rundir.lock import Attempt
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError
from distil_tl.utils.files import write_atomic, write_json
from launch.args import say
from launch.records import read_record
from launch.run_status import evaluations, is_starting, number, stand
from launch.squeue import QueuedJob, SlurmUnavailableError, cancel, queued
from launch.submit import executor_for, stop_here
from launch.sweep import Plan, Spec, launch_trials, make_plan, write_down
from launch.sweep_file import Sweep, Trial, Values, draw_value

STORAGE = "optuna.log"
PRUNED = "pruned.json"
STARTUP = 5  # trials that are completed before any is judged by them


def open_study(sweep: Sweep, folder: Path) -> Any:
    """The study in `folder`, begun or gone on with.

    Raises:
        UserError: it was begun with another space.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / STORAGE
    if path.exists() and not (whole := path.read_bytes()).endswith(b"\n"):
        write_atomic(path, whole[: whole.rfind(b"\n") + 1])  # a kill or a full disk cut its last line
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
        study_name="search",
        direction="minimize" if sweep.metric == "loss" else "maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        load_if_exists=True,
    )
    space = {"metric": sweep.metric, "seed": sweep.seed, "random": sweep.random}
    before = study.user_attrs.get("space", space)
    changed = [f"`{key}`" for key in space if before.get(key) != space[key]]
    if changed:
        raise UserError(
            f"{folder} holds a search with another {' and '.join(changed)}; go back to it, or give another --dir"
        )
    if "space" not in study.user_attrs:
        study.set_user_attr("space", space)
    return study


class Driver:
    """Keeps as many trials under way as it may, and Optuna told of how they do.

    Args:
        plan: of the whole search; its trials are of no interest.
        code: what all trials run.
        claim: on the folder, which nobody else may search.
    """

    def __init__(self, study: Any, spec: Spec, plan: Plan, code: Path, cluster: str, claim: Attempt) -> None:
        self.study, self.spec, self.plan, self.cluster, self.claim = study, spec, plan, cluster, claim
        self.under_way: dict[str, Any] = {}  # by the run directory's name, as all that follows
        self.values: dict[str, Values] = {}  # of these and of all before
        self.reported: Counter[str] = Counter()  # evaluations
        self.doubted: set[str] = set()  # those that were seen to have ended once
        for known in study.get_trials(deepcopy=False):
            self._take_up(known)
        self.left = set(self.under_way)  # by the search before this one
        self.executor = executor_for(plan.folder, code, plan.slurm, cluster, name=plan.sweep.name)
        write_down(plan, self.values)

    def _take_up(self, known: Any) -> None:
        """A trial that the storage has."""
        running = known.state == optuna.trial.TrialState.RUNNING
        if "values" not in known.user_attrs:
            if running:  # the search was killed while it was proposed, and there is no job of it
                self.study.tell(known.number, state=optuna.trial.TrialState.FAIL)
            return
        name = Trial(known.user_attrs["values"]).name
        self.values[name] = known.user_attrs["values"]
        self.reported[name] = 1 + max(known.intermediate_values, default=-1)
        if running:
            self.under_way[name] = optuna.trial.Trial(self.study, known._trial_id)

    def run(self, wanted: int, parallel: int, poll: float) -> int:
        """Until there are as many as wanted, and all of them are over; the exit status."""
        try:
            while self.under_way or len(self.values) < wanted:
                with _undisturbed():
                    self.step(wanted, parallel)
                if self.under_way:
                    time.sleep(poll)
        except KeyboardInterrupt:
            self.leave()
            return EXIT_PREEMPTED
        return self.say_best()

    def step(self, wanted: int, parallel: int) -> None:
        self.claim.check()
        while len(self.values) < wanted and len(self.under_way) < parallel:
            self.propose()
        queue = self.ask()
        for name in list(self.under_way):
            self.look(name, queue)

    def propose(self) -> None:
        """A trial that Optuna suggests; `look` submits it, as it has no job."""
        sweep = self.plan.sweep
        # Of this trial's own, so that a search that goes on does not draw what it has drawn before.
        self.study.sampler = _sampler(f"{sweep.seed} {len(self.study.get_trials(deepcopy=False))}")
        asked = self.study.ask()
        values = {key: draw_value(_Suggest(asked, key), how) for key, how in sweep.random.items()}
        trial = Trial({**values, "seed": sweep.seed + asked.number})  # two alike are still two
        asked.set_user_attr("values", trial.values)
        self.under_way[trial.name], self.values[trial.name] = asked, trial.values
        write_down(self.plan, self.values)

    def look(self, name: str, queue: dict[str, QueuedJob] | None) -> None:
        """See to one trial, and tell Optuna of its evaluations and its end."""
        run_dir, metric, states = self.plan.folder / name, self.plan.sweep.metric, optuna.trial.TrialState
        standing = stand(run_dir, queue)
        if standing.state == "missing" or (standing.state == "stopped" and name in self.left):
            self.launch(name)
            return
        if queue is not None:
            self.left.discard(name)
        self.report(name)
        ended = standing.state in ("failed", "stopped")
        if standing.state == "completed":
            value = number(standing.best or {}, metric)
            self.tell(name, value, states.FAIL if value is None else states.COMPLETE)
        elif ended and name in self.doubted:  # twice: what a node wrote may be seen here after its job has gone
            self.tell(name, None, states.FAIL, standing.detail)
        elif standing.state == "pruned":
            self.prune(name, queue)
        elif standing.state == "running" and self.under_way[name].should_prune():
            write_json(run_dir / PRUNED, {"after": standing.epoch, "stage": standing.stage})
            self.prune(name, queue)
        if ended:
            self.doubted.add(name)
        else:
            self.doubted.discard(name)

    def launch(self, name: str) -> None:
        """Submit a trial, or again one that was stopped with the search.

        Raises:
            UserError: it can't work, or sbatch refuses it while no other job is there to wait for.
        """
        trial = Trial(self.values[name])
        try:
            plan = make_plan(self.spec, self.cluster, [trial])
        except UserError:
            self.tell(name, None, optuna.trial.TrialState.FAIL)
            raise
        try:
            (job,) = launch_trials(plan, self.executor, list(plan.trials), self.cluster)
        except UserError as error:
            if not any(read_record(self.plan.folder / other) for other in self.under_way if other != name):
                raise
            sys.stderr.write(f"launch: {error}; trying again later\n")
            return
        self.left.discard(name)
        say(f"trial {self.under_way[name].number}, job {job.job_id}: {' '.join(trial.arguments)}")

    def report(self, name: str) -> None:
        for index, line in enumerate(evaluations(self.plan.folder / name)):
            if index >= self.reported[name]:
                value = number(line, self.plan.sweep.metric)
                if value is not None:
                    self.under_way[name].report(value, index)
                self.reported[name] = index + 1

    def prune(self, name: str, queue: dict[str, QueuedJob] | None) -> None:
        """End a trial's job; where that can't be done now, it is tried again at the next look."""
        record = read_record(self.plan.folder / name)
        if record is not None and record["cluster"] == "slurm":
            if queue is None:
                return
            job = queue.get(str(record["job_id"]))
            try:
                cancel([job.id] if job is not None and job.lives else [])
            except SlurmUnavailableError as error:
                sys.stderr.write(f"launch: {error}; trying again later\n")
                return
        elif record is not None and is_starting(record):
            stop_here(record["job_id"])
        self.tell(name, None, optuna.trial.TrialState.PRUNED)

    def tell(self, name: str, value: float | None, state: Any, why: str | None = None) -> None:
        trial = self.under_way.pop(name)
        self.study.tell(trial, value, state=state)
        word = {"COMPLETE": "", "FAIL": "failed", "PRUNED": "pruned"}[state.name] if value is None else f"{value:.4f}"
        say(f"trial {trial.number}: {word}{f': {why}' if why else ''}")

    def ask(self) -> dict[str, QueuedJob] | None:
        records = [read_record(self.plan.folder / name) for name in self.under_way]
        if not any(record is not None and record["cluster"] == "slurm" for record in records):
            return {}
        try:
            return queued()
        except SlurmUnavailableError as error:
            sys.stderr.write(f"launch: {error}; asking again later\n")
            return None

    def leave(self) -> None:
        """What Ctrl-C means: jobs of this machine save and end with the search, those of Slurm go on."""
        records = [read_record(self.plan.folder / name) for name in self.under_way]
        here = [record for record in records if record is not None and is_starting(record)]
        for record in here:
            stop_here(record["job_id"])
        with suppress(KeyboardInterrupt):
            while any(map(is_starting, here)):
                time.sleep(0.1)
        others = "" if here or not self.under_way else "; its jobs go on"
        sys.stderr.write(f"launch: the search was stopped, and the same command goes on with it{others}\n")

    def say_best(self) -> int:
        done = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if done:
            best = self.study.best_trial
            values = " ".join(Trial(best.user_attrs["values"]).arguments)
            say(f"best: {self.plan.sweep.metric} {best.value:.4f} of trial {best.number}: {values}")
        else:
            say("no trial was completed")
        say(f"all of them: python -m launch.status {shlex.quote(str(self.plan.folder))}")
        return 0 if done else EXIT_FAULT


class _Suggest:
    """Optuna in the place of a random number generator, for `draw_value`."""

    def __init__(self, trial: Any, key: str) -> None:
        self.trial, self.key = trial, key

    def choice(self, values: list[Any]) -> Any:
        return values[self.trial.suggest_categorical(self.key, list(range(len(values))))]

    def uniform(self, low: float, high: float) -> float:
        found: float = self.trial.suggest_float(self.key, low, high)
        return found


def _sampler(seed: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=random.Random(seed).getrandbits(32), multivariate=True, constant_liar=True
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C comes when this is done, so that no job is submitted of which nothing is written down."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    # What is started meanwhile inherits this: a terminal sends Ctrl-C to sbatch too.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if asked and before is not signal.SIG_IGN:
        raise KeyboardInterrupt
