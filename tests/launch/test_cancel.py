"""Cancelling the jobs of a run or sweep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distil_tl.rundir.lock import Attempt
from launch import cancel
from launch.records import SWEEP_FILE, write_record
from launch.search_lock import LOCK_FILE
from launch.squeue import SlurmUnavailableError
from tests.helpers.fake_slurm import FakeSlurm


@pytest.fixture
def sweep(slurm: FakeSlurm) -> Path:
    """Five trials: one runs, two wait, one has ended, one was never submitted."""
    folder = Path("sweeps/rates")
    states = {"7_0": "RUNNING", "7_1": "PENDING", "7_2": "PENDING", "7_3": "COMPLETED"}
    for job, state in states.items():
        (folder / f"t{job[-1]}").mkdir(parents=True)
        write_record(folder / f"t{job[-1]}", job, "slurm")
        slurm.add(job, state, **({"own": "9", "nodes": "n1"} if state == "RUNNING" else {}))
    (folder / "t3/summary.json").write_text('{"status": "completed"}')
    (folder / SWEEP_FILE).write_text('{"trials": {"t0": {}, "t1": {}, "t2": {}, "t3": {}, "t4": {}}}')
    return folder


def cancelled(slurm: FakeSlurm) -> list[str]:
    return sorted(job for call in slurm.calls("scancel") for job in call)


def test_all_jobs_of_a_sweep_or_those_that_wait(slurm: FakeSlurm, sweep: Path, capsys) -> None:
    assert cancel.main([str(sweep), "--pending"]) == 0
    assert cancelled(slurm) == ["7_1", "7_2"]
    assert capsys.readouterr().out == "cancelled 2 jobs: 7_1, 7_2\n"
    assert cancel.main([str(sweep)]) == 0
    assert capsys.readouterr().out == "cancelled 1 job: 7_0\n"
    assert {job["state"] for job in slurm.jobs.values()} == {"CANCELLED", "COMPLETED"}
    assert cancel.main([str(sweep)]) == 0
    assert capsys.readouterr().out == "nothing to cancel: no job is waiting or running\n"


def test_the_job_of_one_trial_or_run(slurm: FakeSlurm, sweep: Path) -> None:
    assert cancel.main([str(sweep / "t1")]) == 0
    assert cancelled(slurm) == ["7_1"]


def test_a_job_of_a_batch_script(slurm: FakeSlurm) -> None:
    Path("run").mkdir()
    Attempt(Path("run")).begin(0, {"SLURM_JOB_ID": "9"})
    slurm.add("5_2", "RUNNING", own="9", nodes="n1")
    assert cancel.main(["run"]) == 0
    assert cancelled(slurm) == ["5_2"]


def test_a_local_job_is_asked_to_save_and_stop(slurm: FakeSlurm, monkeypatch, capsys) -> None:
    stopped: list[str] = []
    monkeypatch.setattr(cancel, "stop_job", stopped.append)
    Path("run").mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(60)", "submitit.local._local"]
    with subprocess.Popen(command) as process:
        write_record(Path("run"), str(process.pid), "local")
        assert cancel.main(["run"]) == 0
        assert stopped == [str(process.pid)]
        process.kill()
    assert not slurm.calls("scancel")


def test_a_process_that_launch_did_not_start_is_named(slurm: FakeSlurm, capsys) -> None:
    Path("run").mkdir()
    Attempt(Path("run")).begin(0, {})
    assert cancel.main(["run"]) == 1
    assert "run is not cancelled: launch did not start it; end its process on" in capsys.readouterr().err


def test_what_is_refused(slurm: FakeSlurm, sweep: Path, capsys, monkeypatch) -> None:
    assert cancel.main(["sweeps"]) == 2
    assert "sweeps is neither a run directory nor a sweep" in capsys.readouterr().err
    Attempt(sweep, LOCK_FILE).begin(0, {})
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert cancel.main([str(sweep)]) == 2
    assert "of this machine has been searching there" in capsys.readouterr().err
    assert not slurm.calls("scancel")


def test_jobs_that_were_cancelled_before_an_error_are_said(
    slurm: FakeSlurm, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def cancel_jobs(jobs: list[str]) -> None:
        calls.append(jobs)
        if len(calls) == 2:
            raise SlurmUnavailableError("scancel does not answer")

    monkeypatch.setattr(cancel, "AT_ONCE", 1)
    monkeypatch.setattr(cancel, "cancel_jobs", cancel_jobs)
    assert cancel.main([str(sweep)]) == 1
    assert len(calls) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"cancelled 1 job: {calls[0][0]}\n", "launch.cancel: scancel does not answer\n")


def test_slurm_that_does_not_answer(slurm: FakeSlurm, sweep: Path, capsys) -> None:
    slurm.refuse("scancel", "scancel: error: Access/permission denied")
    assert cancel.main([str(sweep)]) == 1
    assert "Access/permission denied" in capsys.readouterr().err
    slurm.refuse("squeue", "Unable to contact slurm controller")
    assert cancel.main([str(sweep)]) == 1
    said = capsys.readouterr()
    assert "Unable to contact slurm controller" in said.err
    assert "t1 is not cancelled: Slurm does not answer" in said.err
    assert said.out == ""
