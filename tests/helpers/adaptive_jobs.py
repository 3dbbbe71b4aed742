"""Simulated jobs for the tests of launch.adaptive, which proceed while the search sleeps."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from launch import adaptive
from launch.records import read_record
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.ranks import lines
from tests.helpers.slurm_commands import ENDED

PLAIN = ["data.root=null", "model.name=shufflenet_v2_x0_5", "model.weights=none"]
SPACE = "{random: {stages.head.lr: {log_uniform: [1e-3, 1]}, optim.name: {choice: [sgd, adamw]}}, count: 4}"
HERE = Path("sweeps/rates")
STOPPED = "the search was stopped"
RESUME = "run the same command to resume"
Curve = Callable[[dict[str, Any]], list[float]]


class Killed(BaseException):
    """Not an Exception, so that no code catches it."""


class Jobs:
    """Jobs that start, evaluate and end, one step in each sleep of the search.

    Args:
        curve: the evaluations of a trial, by its values.
        end: status in its summary.json.
    """

    def __init__(self, slurm: FakeSlurm, curve: Curve, end: str = "completed", metric: str = "top1") -> None:
        self.slurm, self.curve, self.end, self.metric = slurm, curve, end, metric
        self.looks = self.most = 0
        self.meanwhile: dict[int, Callable[[], object]] = {}  # called in the sleep of that number

    def sleep(self, seconds: float) -> None:
        self.looks += 1
        assert self.looks < 200, "the search does not end"
        jobs = self.slurm.jobs
        self.most = max(self.most, sum(job["state"] not in ENDED for job in jobs.values()))
        for run_dir in trials():
            job = (read_record(run_dir) or {}).get("job_id")
            if job not in jobs or jobs[job]["state"] in ENDED:
                continue
            if jobs[job]["state"] == "PENDING":
                self.slurm.change(job, "RUNNING", nodes="n1")
            else:
                self.evaluate(run_dir, job)
        self.meanwhile.get(self.looks, lambda: None)()

    def evaluate(self, run_dir: Path, job: str) -> None:
        curve = self.curve(values_of(run_dir))
        path = run_dir / "metrics.jsonl"
        done = len(lines(run_dir)) if path.exists() else 0
        if done < len(curve):
            line = {"step": done, "epoch": done + 1, "stage": "head", "split": "val", self.metric: curve[done]}
            with path.open("a") as file:
                file.write(json.dumps({"top1": 0.5, "loss": 1.0, **line, "time": time.time()}) + "\n")
        else:
            best = {"top1": 0.5, "loss": 1.0, self.metric: curve[-1]} if curve else None
            (run_dir / "summary.json").write_text(json.dumps({"status": self.end, "best": best}))
            self.slurm.change(job, "COMPLETED")


def searched(*args: str, returns: int = 0) -> None:
    assert adaptive.main([*PLAIN, "rates.yaml", *args]) == returns


def refusal(capsys, *args: str) -> str:
    capsys.readouterr()
    searched(*args, returns=2)
    err: str = capsys.readouterr().err
    assert "Traceback" not in err
    return err.removeprefix("launch.adaptive: ")


def trials() -> list[Path]:
    return sorted(path.parent.absolute() for path in HERE.glob("*/submitted.json"))


def values_of(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((HERE / "sweep.json").read_text())["trials"][run_dir.name]
    return values


def stored() -> list[Any]:
    """The trials in Optuna's storage."""
    backend = optuna.storages.journal.JournalFileBackend(str(HERE / "optuna.log"))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    return list(study.get_trials())


def states() -> Counter[str]:
    return Counter(trial.state.name for trial in stored())
