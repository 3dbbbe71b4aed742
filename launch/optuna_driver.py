"""The loop of an adaptive search: it submits trials as jobs, reports their evaluations to Optuna, and stops weak ones.

Needs Optuna.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.trial import Trial as OptunaTrial
from optuna.trial import TrialState

from distil_tl.rundir.lock import Attempt
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError
from distil_tl.utils.files import write_json
from launch.args import print_line
from launch.evidence import ask_slurm
from launch.executor import make_executor
from launch.failure import explain_failures
from launch.folder_lock import submission_lock
from launch.local_job import is_job_alive, stop_job
from launch.optuna_study import ask_trial
from launch.records import read_open_submissions, read_record
from launch.run_status import PRUNED_FILE, get_number, read_evaluations, read_status
from launch.squeue import Queue, QueuedJob, SlurmUnavailableError, cancel_jobs
from launch.submission import settle
from launch.sweep_file import Trial, Values
from launch.sweep_plan import SweepArgs, SweepPlan, plan_trials, save_plan, submit_trials


class Driver:
    """Keeps up to a number of trials running, and reports to Optuna how they do.

    Args:
        plan: of the sweep; its trials are not used.
        code: the code snapshot that all trials run.
        lock: held on the folder, so that only one process searches there.

    Attributes:
        active: Optuna's trials that have not ended, by name (that of the run directory, as below).
        values: of all trials, ended or not.
        reported: how many evaluations were reported to Optuna.
        seen_ended: trials that had failed or stopped at the last check.
        inherited: active trials that an earlier search process submitted.
    """

    def __init__(self, study: Any, args: SweepArgs, plan: SweepPlan, code: Path, cluster: str, lock: Attempt) -> None:
        self.study, self.args, self.plan, self.cluster, self.lock = study, args, plan, cluster, lock
        self.active: dict[str, Any] = {}
        self.values: dict[str, Values] = {}
        self.reported: Counter[str] = Counter()
        self.seen_ended: set[str] = set()
        for stored in study.get_trials(deepcopy=False):
            self._restore(stored)
        self.inherited = set(self.active)
        self.executor = make_executor(plan.folder, code, plan.slurm, cluster, name=plan.sweep.name)
        save_plan(plan, self.values)

    def _restore(self, stored: Any) -> None:
        """Take over a trial from the storage."""
        running = stored.state == TrialState.RUNNING
        if "values" not in stored.user_attrs:
            if running:  # the search was killed while it proposed this trial, so there is no job
                self.study.tell(stored.number, state=TrialState.FAIL)
            return
        name = Trial(stored.user_attrs["values"]).name
        self.values[name] = stored.user_attrs["values"]
        self.reported[name] = 1 + max(stored.intermediate_values, default=-1)
        if running:
            self.active[name] = OptunaTrial(self.study, stored._trial_id)

    def run(self, wanted: int, parallel: int, poll: float) -> int:
        """Search until `wanted` trials exist and all have ended. Returns the exit status."""
        try:
            while self.active or len(self.values) < wanted:
                with _delayed_ctrl_c():
                    self.step(wanted, parallel)
                if self.active:
                    time.sleep(poll)
        except KeyboardInterrupt:
            self.stop()
            return EXIT_PREEMPTED
        return self.print_best()

    def step(self, wanted: int, parallel: int) -> None:
        """Propose new trials, and check all active ones once."""
        self.lock.check()
        if read_open_submissions(self.plan.folder):  # sbatch failed, and Slurm did not say whether it has the job
            with suppress(UserError), submission_lock(self.plan.folder):
                settle(self.plan.folder)
        while len(self.values) < wanted and len(self.active) < parallel:
            self.propose()
        queue = self.read_queue()
        for name in list(self.active):
            self.check_trial(name, queue)

    def propose(self) -> None:
        """Add a trial that Optuna suggests. It has no job yet; `check_trial` submits it."""
        asked, values = ask_trial(self.study, self.plan.sweep)
        name = Trial(values).name
        self.active[name], self.values[name] = asked, values
        save_plan(self.plan, self.values)

    def check_trial(self, name: str, queue: Mapping[str, QueuedJob] | None) -> None:
        """Submit, report, prune or end one trial, by its state."""
        run_dir = self.plan.folder / name
        status = read_status(run_dir, queue)
        if status.state == "missing" or (status.state == "stopped" and name in self.inherited):
            self.submit(name)
            return
        if queue is not None:
            self.inherited.discard(name)
        self.report(name)
        ended = status.state in ("failed", "stopped")
        if status.state == "completed":
            value = get_number(status.best or {}, self.plan.sweep.metric)
            self.tell(name, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
        elif ended and name in self.seen_ended:  # at two checks, as a node's last files may appear late
            self.tell(name, None, TrialState.FAIL, explain_failures([status])[0].detail)
        elif status.state == "pruned":
            self.prune(name, queue)
        elif status.state == "running" and self.active[name].should_prune():
            write_json(run_dir / PRUNED_FILE, {"after": status.epoch, "stage": status.stage})
            self.prune(name, queue)
        if ended:
            self.seen_ended.add(name)
        else:
            self.seen_ended.discard(name)

    def submit(self, name: str) -> None:
        """Submit a trial, or resubmit one that stopped together with an earlier search process.

        Raises:
            UserError: it can't work, or sbatch refuses it and no other trial has a job to wait for.
        """
        trial = Trial(self.values[name])
        try:
            plan = plan_trials(self.args, self.cluster, [trial])
        except UserError:
            self.tell(name, None, TrialState.FAIL)
            raise
        try:
            with submission_lock(self.plan.folder) as descriptor:
                self.lock.check()
                (job,) = submit_trials(plan, self.executor, list(plan.trials), self.cluster, descriptor)
        except UserError as error:
            if not any(read_record(self.plan.folder / other) for other in self.active if other != name):
                raise
            _warn_retry(error)
            return
        self.inherited.discard(name)
        print_line(f"trial {self.active[name].number}, job {job.job_id}: {' '.join(trial.arguments)}")

    def report(self, name: str) -> None:
        """Report new evaluations of a trial to Optuna."""
        for index, line in enumerate(read_evaluations(self.plan.folder / name)):
            if index >= self.reported[name]:
                value = get_number(line, self.plan.sweep.metric)
                if value is not None:
                    self.active[name].report(value, index)
                self.reported[name] = index + 1

    def prune(self, name: str, queue: Mapping[str, QueuedJob] | None) -> None:
        """End a trial's job. If Slurm does not answer, the trial stays active, and the next check tries again."""
        record = read_record(self.plan.folder / name)
        if record is not None and record["cluster"] == "slurm":
            if queue is None:
                return
            job = queue.get(str(record["job_id"]))
            try:
                cancel_jobs([job.id] if job is not None and job.is_active else [])
            except SlurmUnavailableError as error:
                _warn_retry(error)
                return
        elif record is not None and is_job_alive(record):
            stop_job(record["job_id"])
        self.tell(name, None, TrialState.PRUNED)

    def tell(self, name: str, value: float | None, state: Any, why: str | None = None) -> None:
        """End a trial in Optuna's storage."""
        trial = self.active.pop(name)
        self.study.tell(trial, value, state=state)
        result = {"COMPLETE": "", "FAIL": "failed", "PRUNED": "pruned"}[state.name] if value is None else f"{value:.4f}"
        print_line(f"trial {trial.number}: {result}{f': {why}' if why else ''}")

    def read_queue(self) -> Queue | None:
        """Slurm's queue; None if Slurm does not answer, empty if no active trial is a Slurm job."""
        queue, why = ask_slurm([self.plan.folder / name for name in self.active])
        if why is not None:
            _warn_retry(why)
        return queue

    def stop(self) -> None:
        """End the search after Ctrl-C: local jobs save and stop, Slurm's jobs continue."""
        records = [read_record(self.plan.folder / name) for name in self.active]
        local = [record for record in records if record is not None and is_job_alive(record)]
        for record in local:
            stop_job(record["job_id"])
        with suppress(KeyboardInterrupt):
            while any(map(is_job_alive, local)):
                time.sleep(0.1)
        jobs = "" if local or not self.active else "; its jobs continue"
        sys.stderr.write(f"launch: the search was stopped{jobs}; run the same command to resume\n")

    def print_best(self) -> int:
        """Print the best trial. Returns the exit status: a fault if no trial completed."""
        completed = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if completed:
            best = self.study.best_trial
            values = " ".join(Trial(best.user_attrs["values"]).arguments)
            print_line(f"best: {self.plan.sweep.metric} {best.value:.4f} of trial {best.number}: {values}")
        else:
            print_line("no trial completed")
        print_line(f"all trials: python -m launch.status {shlex.quote(str(self.plan.folder))}")
        return 0 if completed else EXIT_FAULT


def _warn_retry(error: object) -> None:
    sys.stderr.write(f"launch: {error}; trying again later\n")


@contextmanager
def _delayed_ctrl_c() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block, so that every submitted job is also recorded."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    # Child processes inherit the mask: a terminal sends Ctrl-C to sbatch, too.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if received and before is not signal.SIG_IGN:
        raise KeyboardInterrupt
