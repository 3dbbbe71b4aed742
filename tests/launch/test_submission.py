"""A submission that is killed, or fails to write, at any moment: the same command leaves each trial with one job."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from launch import sweep
from launch.folder_lock import submission_lock
from launch.records import Submission, read_record
from launch.run_status import read_status
from launch.slurm_config import SlurmConfig
from launch.squeue import read_queue
from launch.sweep_file import Sweep, Trial
from launch.sweep_plan import SweepArgs, SweepPlan
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.paths import ROOT
from tests.helpers.submissions import PLAIN
from tests.helpers.submissions import submitted as submitted_run

SIGNALS = (signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
Kill = Callable[[], None]


class Command:
    """launch.sweep of three trials in a forked process, without the planning, which writes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.number = monkeypatch, 0
        monkeypatch.setattr(sweep, "take_snapshot", lambda folder: Path("/code"))
        monkeypatch.setattr(sweep, "refuse_other_common", lambda plan: None)
        self.new_folder()

    def new_folder(self) -> None:
        self.number += 1
        self.folder = Path(f"sweep-{self.number}").absolute()
        trials = {self.folder / name: (Trial({"seed": i}), "seed: 0\n") for i, name in enumerate("abc")}
        plan = SweepPlan(Sweep("rates"), self.folder, SlurmConfig(), {}, trials)
        self.monkeypatch.setattr(
            sweep, "read_sweep_args", lambda *_: SweepArgs(plan.sweep, [], self.folder, plan.slurm)
        )
        self.monkeypatch.setattr(sweep, "plan_trials", lambda *_: plan)

    def run(self, before: Kill = lambda: None) -> int:
        """In this process. Returns the exit status."""
        before()
        return sweep.main(["rates.yaml", "--no-test"])

    def start(self, before: Kill = lambda: None) -> int:
        """In a new process, whose id is returned."""
        process = os.fork()
        if process == 0:
            status = 70
            try:
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # whatever earlier tests left
                    signal.signal(number, signal.SIG_DFL)
                status = self.run(before)
            finally:
                os._exit(status)
        return process

    def ended(self, before: Kill = lambda: None) -> int:
        """Its exit status; negative if a signal ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(before), 0)[1])

    def assert_one_job_each(self, slurm: FakeSlurm) -> None:
        jobs = [name for name, job in slurm.jobs.items() if str(self.folder) in job["command"]]
        records = [read_record(self.folder / name) for name in "abc"]
        assert sorted(record["job_id"] for record in records if record is not None) == sorted(jobs)
        assert len(jobs) == 3
        left = [path for path in self.folder.rglob("*") if "distil_tl-" in path.name]
        assert not left
        for job in jobs:
            assert (self.folder / "slurm" / f"{job}_submitted.pkl").exists(), "without it the job can't train"


@pytest.fixture
def command(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(monkeypatch)


def at_line(line: int, action: Kill, counted: list[int]) -> None:
    """Trigger `action` at the line of that number that this process executes in our code."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        counted[0] += event == "line"
        if counted[0] == line and event == "line":
            action()
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        ours = frame.f_code.co_filename.startswith((f"{ROOT}/launch/", f"{ROOT}/distil_tl/utils/files"))
        return local if ours else None

    sys.settrace(enter)


def test_a_submitter_killed_at_twenty_moments_forgets_and_doubles_no_job(slurm: FakeSlurm, command: Command) -> None:
    counted = [0]
    try:
        assert command.run(lambda: at_line(-1, lambda: None, counted)) == 0
    finally:
        sys.settrace(None)
    command.assert_one_job_each(slurm)
    assert counted[0] > 300
    chosen = random.Random(1)
    struck = 0
    for number in range(20):
        command.new_folder()
        line, how = chosen.randrange(1, counted[0]), SIGNALS[number % 4]
        status = command.ended(lambda: at_line(line, lambda: os.kill(os.getpid(), how), [0]))  # noqa: B023
        struck += status == -how
        assert command.ended() == 0, (line, how)
        command.assert_one_job_each(slurm)
    assert struck == 20


def test_a_job_whose_submitter_was_killed_before_sbatch_answered(
    slurm: FakeSlurm, command: Command, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """sbatch goes on, and holds the lock."""
    slurm.configure(hold=True)
    process = command.start()
    while not slurm.calls("sbatch-began"):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with monkeypatch.context() as patch:
        patch.setattr("launch.folder_lock.PATIENCE_S", 0)
        assert command.run() == 2
    assert f"process {process} on " in capfd.readouterr().err
    assert not slurm.jobs
    (slurm.folder / "go").touch()
    assert command.run() == 0
    command.assert_one_job_each(slurm)
    assert len(slurm.jobs) == 3
    assert "launch: found job 7, whose submission was interrupted\n" in capfd.readouterr().err


def test_two_commands_at_once_submit_once(slurm: FakeSlurm, command: Command) -> None:
    slurm.configure(hold=True)
    processes = [command.start() for _ in range(3)]
    while not slurm.calls("sbatch-began"):
        time.sleep(0.01)
    (slurm.folder / "go").touch()
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0, 0]
    command.assert_one_job_each(slurm)
    assert len(slurm.calls("sbatch")) == 1


@pytest.fixture
def interrupted(slurm: FakeSlurm, command: Command) -> Command:
    """After sbatch, before its answer was written down."""
    write = Submission.write

    def kill(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL) if self.job_id else write(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Submission, "write", kill)
        assert command.ended() == -signal.SIGKILL
    assert list(slurm.jobs) == ["7_0", "7_1", "7_2"]
    return command


def test_the_status_finds_jobs_that_are_not_recorded(slurm: FakeSlurm, interrupted: Command) -> None:
    assert read_record(interrupted.folder / "b") is None
    found = read_status(interrupted.folder / "b", read_queue())
    assert (found.state, found.job_id) == ("pending", "7_1")
    unasked = read_status(interrupted.folder / "b", None)
    assert (unasked.state, unasked.detail) == ("unknown", "Slurm does not answer")


def test_a_started_job_is_found_when_slurm_has_forgotten_it(slurm: FakeSlurm, interrupted: Command) -> None:
    script = slurm.jobs["7_0"]["script"].partition("# setup\n")[2].splitlines()[0]
    for task in (0, 1):
        environ = f"SLURM_JOB_ID=9 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID={task};"
        assert os.system(f"{environ} {script}") == 0
        slurm.forget(f"7_{task}")
    slurm.forget("7_2")
    assert (interrupted.folder / "slurm/7_1_submitted.pkl").read_bytes()
    (interrupted.folder / "slurm/7_0_0_log.out").touch()
    (interrupted.folder / "slurm/7_1_0_log.out").touch()
    assert interrupted.run() == 0
    assert {name: (read_record(interrupted.folder / name) or {})["job_id"] for name in "abc"} == {
        "a": "7_0", "b": "7_1", "c": "8"
    }, "c never started"  # fmt: skip


def test_what_slurm_can_not_be_asked_about_is_not_submitted_again(
    slurm: FakeSlurm, interrupted: Command, capsys
) -> None:
    slurm.configure(cluster="other")
    assert interrupted.run() == 2
    assert "on the cluster fake; ask from there" in capsys.readouterr().err
    slurm.configure(cluster="fake")
    slurm.refuse("squeue", "no controller")
    assert interrupted.run() == 2
    assert "was interrupted, and Slurm can't be asked whether it has the job (squeue: no controller)" in (
        capsys.readouterr().err
    )
    slurm.refuse("squeue", None)
    assert interrupted.run() == 0
    interrupted.assert_one_job_each(slurm)


def test_a_run_of_an_interrupted_sweep_is_not_submitted_by_itself(
    slurm: FakeSlurm, interrupted: Command, capsys
) -> None:
    from launch import submit

    assert submit.main([*PLAIN, f"run_dir={interrupted.folder}/b"]) == 2
    assert "job 7_1 (PENDING) is using" in capsys.readouterr().err


def test_a_lost_answer_of_sbatch(slurm: FakeSlurm, command: Command, capsys) -> None:
    """`Socket timed out` tells nothing: the controller may have the job."""
    slurm.configure(lost=True)
    assert command.run() == 0
    command.assert_one_job_each(slurm)
    assert "Socket timed out on send/recv operation; but Slurm has it, as job 7\n" in capsys.readouterr().err
    slurm.configure(lost=False)
    assert command.run() == 0
    assert len(slurm.jobs) == 3


def test_a_comment_of_the_user_is_kept(slurm: FakeSlurm, interrupted: Command, monkeypatch) -> None:
    """Jobs are found by the name of the script, too."""
    for job, found in slurm.jobs.items():
        slurm.change(job, found["state"], comment="project 5")
    assert interrupted.run() == 0
    interrupted.assert_one_job_each(slurm)


def test_a_full_disk_at_any_write(slurm: FakeSlurm, command: Command, monkeypatch, capsys) -> None:
    real, fails, calls = os.fsync, 0, [0]
    outcomes: list[tuple[int, int]] = []

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    while not outcomes or outcomes[-1][0] != 0:
        fails, calls[0], before = fails + 1, 0, len(slurm.jobs)
        status = command.run()
        said = capsys.readouterr().err
        outcomes.append((status, len(slurm.jobs) - before))
        if status == 0:
            break
        assert said.count("No space left on device") == said.count("\n") == 1
        assert ("nothing was submitted" in said) is (status == 2)
        assert not list(command.folder.rglob("*.tmp"))
        if status == 1:
            calls[0] = fails
            assert command.run() == 0
            command.assert_one_job_each(slurm)
            command.new_folder()
            capsys.readouterr()
        else:
            assert not list(command.folder.rglob("*distil_tl-*"))
    assert list(dict.fromkeys(outcomes)) == [(2, 0), (1, 3), (0, 3)], "nothing, or one array that is found"


def test_a_folder_that_can_not_be_written(slurm: FakeSlurm, command: Command, capsys) -> None:
    command.folder.write_text("")
    assert command.run() == 2
    assert (
        capsys.readouterr().err
        == f"launch.sweep: can't write in {command.folder}: Not a directory; nothing was submitted\n"
    )


def test_a_lock_that_is_held_for_long_is_named(slurm: FakeSlurm, command: Command, monkeypatch, capsys) -> None:
    monkeypatch.setattr("launch.folder_lock.PATIENCE_S", 0)
    with submission_lock(command.folder):
        assert command.run() == 2
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    assert command.run() == 0


def test_a_run_is_recorded_with_its_cluster_and_user(slurm: FakeSlurm) -> None:
    submitted_run()
    record = read_record(Path("runs/flowers")) or {}
    assert (record["slurm_cluster"], record["uid"]) == ("fake", os.getuid())
