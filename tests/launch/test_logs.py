"""The output of a run's job."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import logs
from launch.records import SWEEP_FILE, write_record
from tests.helpers.fake_slurm import FakeSlurm


@pytest.fixture
def run(slurm: FakeSlurm) -> Path:
    """A run of two ranks, job 7, which runs."""
    folder = Path("run")
    (folder / "slurm").mkdir(parents=True)
    write_record(folder, "7", "slurm")
    slurm.add("7", "RUNNING", nodes="n1")
    for rank in (0, 1):
        (folder / f"slurm/7_{rank}_log.out").write_text(f"of rank {rank}: 猫\n")
    (folder / "slurm/5_0_log.out").write_text("of an earlier job\n")
    return folder


def test_the_output_of_a_rank(run: Path, capsys) -> None:
    assert logs.main([str(run)]) == 0
    assert capsys.readouterr().out == "of rank 0: 猫\n"
    assert logs.main([str(run), "--rank=1"]) == 0
    assert capsys.readouterr().out == "of rank 1: 猫\n"
    assert logs.main([str(run), "--rank=2"]) == 2
    assert "there is no output of rank 2, but of 0, 1" in capsys.readouterr().err


def test_of_a_trial_in_the_folder_of_its_sweep(slurm: FakeSlurm, capsys) -> None:
    for task in (1, 11):
        Path(f"sweep/t{task}/slurm").mkdir(parents=True)
        write_record(Path(f"sweep/t{task}"), f"7_{task}", "slurm")
        Path("sweep/slurm").mkdir(exist_ok=True)
        Path(f"sweep/slurm/7_{task}_0_log.out").write_text(f"of task {task}\n")
    Path("sweep", SWEEP_FILE).write_text('{"trials": {"t1": {}, "t11": {}}}')
    assert logs.main(["sweep/t1"]) == 0
    assert capsys.readouterr().out == "of task 1\n"
    assert logs.main(["sweep"]) == 2
    assert "is a sweep; give the folder of a trial, such as" in capsys.readouterr().err


def test_without_a_job_the_log_of_the_rank(run: Path, capsys) -> None:
    (run / "submitted.json").unlink()
    (run / "attempt.json").write_text("{}")
    (run / "logs").mkdir()
    (run / "logs/rank-1.log").write_text("its own log\n")
    assert logs.main([str(run), "--rank=1"]) == 0
    assert capsys.readouterr().out == "its own log\n"


def test_before_a_job_starts(slurm: FakeSlurm, capsys) -> None:
    Path("run").mkdir()
    write_record(Path("run"), "7", "slurm")
    slurm.add("7", reason="Priority")
    assert logs.main(["run"]) == 2
    assert "there is no output of rank 0: " in (said := capsys.readouterr().err)
    assert said.endswith("/run is pending (Priority)\n")


def test_following_waits_for_the_job_and_ends_with_it(run: Path, slurm: FakeSlurm, capsys, monkeypatch) -> None:
    """Each step happens while the command sleeps."""
    output = run / "slurm/7_0_log.out"
    output.unlink()
    (run / "slurm/7_1_log.out").unlink()
    slurm.change("7", "PENDING", nodes="", reason="Priority")
    clock = [0.0]

    def append(text: bytes) -> None:
        with output.open("ab") as file:
            file.write(text)

    def end() -> None:
        append(b"last\n")
        slurm.change("7", "COMPLETED")
        (run / "summary.json").write_text('{"status": "completed"}')

    steps = iter([lambda: append("first 猫".encode()[:-1]), lambda: append("猫".encode()[-1:] + b"\n"), end])

    def sleep(seconds: float) -> None:
        clock[0] += 60
        next(steps, lambda: None)()

    monkeypatch.setattr(logs, "monotonic", lambda: clock[0])
    monkeypatch.setattr(logs, "sleep", sleep)
    assert logs.main([str(run), "-f"]) == 0
    said = capsys.readouterr()
    assert said.out == "first 猫\nlast\n"
    assert "is pending (Priority); waiting for its output" in said.err


def test_what_is_no_run(slurm: FakeSlurm, capsys) -> None:
    Path("empty").mkdir()
    assert logs.main(["empty"]) == 2
    assert "empty is not a run directory" in capsys.readouterr().err
