"""Adaptive search: proposals, pruning, and how it is resumed after it, a trial or Slurm failed."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import adaptive, optuna_driver, optuna_study, status, sweep_plan
from launch.records import read_record
from tests.helpers.adaptive_jobs import (
    HERE,
    PLAIN,
    RESUME,
    SPACE,
    STOPPED,
    Jobs,
    Killed,
    refusal,
    searched,
    states,
    stored,
    trials,
    values_of,
)
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.ranks import lines

# Proposing


def test_a_search_from_its_first_trial_to_its_last(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    jobs.curve = lambda values: [0.1, 0.9 if values["optim.name"] == "adamw" else 0.6 - values["stages.head.lr"] / 10]
    searched("--trials=6", "--parallel=3", "slurm.time=60")
    assert jobs.most == 3
    assert len(slurm.calls("sbatch")) == len(trials()) == 6
    assert all("#SBATCH --time=60\n" in job["script"] and "--array" not in job["script"] for job in slurm.jobs.values())
    assert states() == {"COMPLETE": 6}
    values = [values_of(run_dir) for run_dir in trials()]
    assert sorted(given["seed"] for given in values) == list(range(6)), "two with the same values are still two"
    assert all(1e-3 <= given["stages.head.lr"] <= 1 for given in values)
    for run_dir in trials():
        saved = yaml.safe_load((run_dir / "slurm/config.yaml").read_text())
        given = values_of(run_dir)
        assert (saved["stages"]["head"]["lr"], saved["optim"]["name"], saved["seed"]) == tuple(given.values())
        assert (saved["run_dir"], saved["tracking"]["wandb"]["group"]) == (str(run_dir), "rates")
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"best: top1 0.9000 of trial \d: stages.head.lr=\S+ optim.name=adamw seed=\d", said[-2])
    assert said[-1] == f"all trials: python -m launch.status {HERE.absolute()}"
    assert status.main([str(HERE)]) == 0
    assert "\n6 completed\n" in capsys.readouterr().out
    for trial in stored():
        assert list(trial.intermediate_values) == [0, 1]


def test_a_larger_number_of_trials_extends_the_search(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    searched()
    assert states() == {"COMPLETE": 4}, "the sweep's count"
    searched()
    assert len(slurm.calls("sbatch")) == 4
    searched("--trials=6")
    assert states() == {"COMPLETE": 6}
    rates = [trial.user_attrs["values"]["stages.head.lr"] for trial in stored()]
    assert len(set(rates)) == 6, "a resumed search repeats no draw"


def test_the_same_search_proposes_the_same_in_one_go_and_in_two(slurm: FakeSlurm, jobs: Jobs) -> None:
    searched("--parallel=1", "--trials=3")
    searched("--parallel=1", "--trials=5")
    there = [trial.user_attrs["values"] for trial in stored()]
    HERE.rename("sweeps/there")
    searched("--parallel=1", "--trials=5")
    assert [trial.user_attrs["values"] for trial in stored()] == there


def test_a_full_disk_while_it_writes(
    slurm: FakeSlurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls, fails = os.fsync, 0, 10**9

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    searched("--trials=2")
    total, statuses = calls, []
    for number, part in enumerate((0, 0.3, 0.6, 0.9)):
        HERE.rename(f"sweeps/{number}")
        before = len(slurm.calls("sbatch"))
        calls, fails = 0, int(part * total)
        capsys.readouterr()
        statuses.append(adaptive.main([*PLAIN, "rates.yaml", "--trials=2"]))
        said = capsys.readouterr().err
        assert said.count("No space left on device") == 1, said
        assert "Traceback" not in said
        fails = 10**9
        (HERE / "search.json").unlink(missing_ok=True)  # it names this process, which would have ended
        searched("--trials=2")
        assert states() == {"COMPLETE": 2}
        assert len(slurm.calls("sbatch")) - before == 2, "no trial is submitted twice"
    assert statuses == [2, 1, 1, 1]


# Pruning


@pytest.mark.parametrize(("metric", "good", "bad"), [("top1", 0.9, 0.1), ("loss", 0.1, 0.9)])
def test_weak_trials_are_ended_early(
    slurm: FakeSlurm, jobs: Jobs, metric: str, good: float, bad: float, capsys
) -> None:
    Path("rates.yaml").write_text(SPACE.replace("{random", f"{{metric: {metric}, random"))
    jobs.metric = metric
    jobs.curve = lambda values: [good if values["seed"] < optuna_study.STARTUP else bad] * 4
    searched("--trials=8", "--parallel=1")
    assert states() == {"COMPLETE": 5, "PRUNED": 3}
    pruned = [run_dir for run_dir in trials() if values_of(run_dir)["seed"] >= optuna_study.STARTUP]
    for run_dir in pruned:
        job = (read_record(run_dir) or {})["job_id"]
        assert slurm.jobs[job]["state"] == "CANCELLED"
        assert len(lines(run_dir)) == 1
        assert json.loads((run_dir / "pruned.json").read_text()) == {"after": 1, "stage": "head"}
    assert f"best: {metric} {good:.4f}" in capsys.readouterr().out
    assert status.main([str(HERE)]) == 0
    assert "\n5 completed, 3 pruned\n" in capsys.readouterr().out


def weak(values: dict[str, Any]) -> list[float]:
    return [0.9 if values["seed"] < optuna_study.STARTUP else 0.1] * 4


def test_a_search_killed_before_it_ended_a_pruned_job_ends_it_later(
    slurm: FakeSlurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.curve = weak

    def kill(ids: list[str]) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(optuna_driver, "cancel_jobs", kill)
        with pytest.raises(Killed):
            searched("--trials=6", "--parallel=1")
    assert slurm.jobs["12"]["state"] == "RUNNING"
    searched("--trials=6", "--parallel=1")
    assert slurm.jobs["12"]["state"] == "CANCELLED"
    assert states() == {"COMPLETE": 5, "PRUNED": 1}


def test_a_job_is_pruned_later_when_slurm_does_not_answer(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    jobs.curve = weak
    slurm.refuse("scancel", "Unable to contact slurm controller")
    told = len(weak({"seed": 0}))
    after = optuna_study.STARTUP * (told + 2) + 5
    jobs.meanwhile[after] = lambda: slurm.refuse("scancel", None)
    searched("--trials=6", "--parallel=1")
    assert states() == {"COMPLETE": 5, "PRUNED": 1}
    assert slurm.jobs["12"]["state"] == "CANCELLED"
    assert "launch: scancel: Unable to contact slurm controller; trying again later" in capsys.readouterr().err


# Ends of the search


PLACES: dict[str, tuple[Any, str]] = {
    "draw_value": (optuna_study, "draw_value"),
    "submit": (optuna_driver.Driver, "submit"),
    "submit_trials": (optuna_driver, "submit_trials"),
    "check_trial": (optuna_driver.Driver, "check_trial"),
    "tell": (optuna_driver.Driver, "tell"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("calls", [1, 3])
def test_a_search_that_is_killed_anywhere_can_be_resumed(
    slurm: FakeSlurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, place: str, calls: int
) -> None:
    """Killed at the first or a later call of that function."""
    target, name = PLACES[place]
    function, count = getattr(target, name), [0]

    def kill(*args: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            raise Killed
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, kill)
        with pytest.raises(Killed):
            searched("--parallel=2")
    searched("--parallel=2")
    found = states()
    assert found["COMPLETE"] == 4
    assert found["FAIL"] <= 1, "one that had no values yet"
    assert found["RUNNING"] == 0
    assert len(slurm.calls("sbatch")) == len(trials()) == 4
    assert {run_dir.name for run_dir in trials()} == set(json.loads((HERE / "sweep.json").read_text())["trials"])
    for trial in stored():
        assert trial.state.name == "FAIL" or list(trial.intermediate_values.values()) == [0.5, 0.6]


def test_ctrl_c_does_not_stop_slurm_jobs(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    jobs.meanwhile[2] = lambda: os.kill(os.getpid(), signal.SIGINT)
    searched("--parallel=2", returns=3)
    assert capsys.readouterr().err == f"launch: {STOPPED}; its jobs continue; {RESUME}\n"
    assert [job["state"] for job in slurm.jobs.values()] == ["RUNNING"] * 2
    assert "ended_at" in json.loads((HERE / "search.json").read_text())
    searched("--parallel=2")
    assert states() == {"COMPLETE": 4}
    assert len(slurm.calls("sbatch")) == 4


def test_ctrl_c_during_a_submission_waits_until_the_job_is_recorded(
    slurm: FakeSlurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = sweep_plan.submit_trials

    def interrupt(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        code = "import signal, sys; sys.exit(signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "sbatch is not hit either"
        return submit(*args)

    monkeypatch.setattr(optuna_driver, "submit_trials", interrupt)
    searched("--parallel=1", returns=3)
    assert len(trials()) == len(slurm.calls("sbatch")) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_incomplete_last_line_of_the_storage_is_dropped(slurm: FakeSlurm, jobs: Jobs) -> None:
    searched("--trials=2")
    whole = (HERE / "optuna.log").read_bytes()
    (HERE / "optuna.log").write_bytes(whole + whole.splitlines()[-1][:9])
    searched("--trials=3")
    assert states() == {"COMPLETE": 3}


# Ends of trials


def test_failed_trials_do_not_end_the_search(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    jobs.meanwhile[2] = lambda: slurm.change("8", "FAILED")
    jobs.meanwhile[3] = lambda: slurm.change("9", "CANCELLED")  # by hand
    searched("--parallel=3")
    assert states() == {"COMPLETE": 2, "FAIL": 2}
    said = capsys.readouterr().out
    assert "trial 1: failed: exited without writing a status (job 8 is FAILED)\n" in said
    assert "trial 2: failed: cancelled\n" in said


@pytest.mark.parametrize(("end", "curve"), [("failed", [0.5]), ("completed", []), ("completed", [None])])
def test_a_search_in_which_all_fail_is_a_fault(
    slurm: FakeSlurm, jobs: Jobs, capsys, end: str, curve: list[Any]
) -> None:
    """Also if they evaluate nothing, or the metric is not a number."""
    jobs.end, jobs.curve = end, lambda values: curve
    searched("--trials=2", returns=1)
    assert states() == {"FAIL": 2}
    assert "no trial completed\n" in capsys.readouterr().out


def test_a_preempted_trial_is_resumed(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    """Also while Slurm does not say that it is in the queue again, or what a node wrote is late to be seen."""
    (look,) = (3,)

    def preempted() -> None:
        (run_dir,) = trials()
        (run_dir / "summary.json").write_text('{"status": "preempted", "best": null}')
        slurm.change("7", "PENDING", nodes="")
        slurm.refuse("squeue", "no controller")

    def late() -> None:
        slurm.change("7", "COMPLETED")

    def back() -> None:
        slurm.refuse("squeue", None)
        slurm.change("7", "RUNNING", nodes="n1")

    jobs.meanwhile = {look: preempted, look + 2: lambda: slurm.refuse("squeue", None), look + 5: late, look + 6: back}
    jobs.curve = lambda values: [0.5] * 9
    searched("--trials=1")
    assert states() == {"COMPLETE": 1}
    assert len(slurm.calls("sbatch")) == 1
    assert "launch: squeue: no controller; trying again later\n" in capsys.readouterr().err


def test_submission_is_retried_while_sbatch_refuses(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    """For example at a limit of jobs; if no other trial has a job, the search ends."""
    words = "sbatch: error: Job violates accounting/QOS policy"
    jobs.meanwhile = {1: lambda: slurm.refuse("sbatch", words), 8: lambda: slurm.refuse("sbatch", None)}
    jobs.curve = lambda values: [0.5] * (2 if values["seed"] < 1 else 9)
    searched("--parallel=2")
    assert states() == {"COMPLETE": 4}
    assert f"{words}; trying again later" in capsys.readouterr().err

    HERE.rename("sweeps/other")
    slurm.refuse("sbatch", words)
    assert f"sbatch refused the job: {words}" in refusal(capsys, "--trials=2")
    slurm.refuse("sbatch", None)
    searched("--trials=2")
    assert states() == {"COMPLETE": 2}, "none of them was given up"
