"""What `launch.status` shows of a run, a sweep, or a folder of runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distil_tl.utils.intervals import wilson
from launch import status
from launch.job_output import last_message
from launch.records import write_record
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.paths import ROOT


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm-bin")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def finished(run_dir: Path, state: str = "completed", **best: Any) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "submitted.json").exists():
        write_record(run_dir, "7", "slurm")
    content = {"status": state, "best": {"stage": "full", "epoch": 2, "step": 20, **best} if best else None}
    (run_dir / "summary.json").write_text(json.dumps({**content, "total_seconds": 12.5}))
    return run_dir


def sweep(folder: Path, trials: dict[str, dict[str, Any]], metric: str = "top1") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"name": folder.name, "metric": metric, "trials": trials}))
    return folder


def shown(capsys, *args: object) -> str:
    assert status.main([str(arg) for arg in args]) == 0
    out: str = capsys.readouterr().out
    return out


def counts(text: str) -> list[str]:
    """The lines below tables, such as `2 completed, 1 failed`."""
    return re.findall(r"^\d+ [a-z]+(?:, \d+ [a-z]+)*$", text, re.MULTILINE)


def column(text: str, name: str) -> list[str]:
    """The cells under a heading, by where the table's rules are."""
    head, rules, *rows = text.partition(counts(text)[0])[0].splitlines()
    for rule in re.finditer("-+", rules):
        if head[rule.start() : rule.end()].strip() == name:
            return [row[rule.start() : rule.end()].strip() for row in rows]
    raise AssertionError(f"no column {name!r} in\n{text}")


# Ranking


def test_the_best_run_is_first(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    for name, top1 in (("a", 0.5), ("b", 0.9), ("c", 0.7)):
        finished(tmp_path / "runs" / name, top1=top1, loss=1.0)
    text = shown(capsys, tmp_path / "runs")
    assert column(text, "run") == ["b", "c", "a"]
    assert column(text, "top1") == ["0.9000", "0.7000", "0.5000"]
    assert column(text, "") == ["1", "2", "3"]


def test_figures_have_their_intervals(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    """By the number of images, or as the run recorded them; `finished` writes neither."""
    finished(tmp_path / "runs" / "a", top1=0.9)
    finished(tmp_path / "runs" / "b", top1=0.8, n=100)
    finished(tmp_path / "runs" / "c", top1=0.7, n=None, intervals=0)
    low, high = wilson(80, 100) or (0.0, 0.0)
    assert column(shown(capsys, tmp_path / "runs"), "top1") == ["0.9000", f"0.8000 ± {(high - low) / 2:.4f}", "0.7000"]
    rows = json.loads(shown(capsys, tmp_path / "runs", "--json"))["runs"]
    assert [row["intervals"] for row in rows] == [{}, {"top1": [low, high]}, {}]
    folder = sweep(tmp_path / "s", {"a": {}, "b": {}}, metric="macro_f1")
    for name, f1 in (("a", 0.5), ("b", 0.4)):
        saved = json.loads((finished(folder / name, macro_f1=f1) / "summary.json").read_text())
        own = {"intervals": {"macro_f1": [f1 - 0.1, f1 + 0.2]} if name == "a" else {"macro_f1": ["?", None]}}
        (folder / name / "summary.json").write_text(json.dumps({**saved, **own}))
    assert column(shown(capsys, folder), "macro_f1") == ["0.5000 ± 0.1500", "0.4000"]


def test_equal_ones_by_loss_and_then_by_name(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    for name, loss in (("a", 0.4), ("b", 0.2), ("c", None), ("d", 0.2), ("e", 0.3)):
        finished(tmp_path / "runs" / name, top1=0.9, loss=loss)
    assert column(shown(capsys, tmp_path / "runs"), "run") == ["b", "d", "e", "a", "c"]


def test_of_loss_the_smallest_is_best(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    folder = sweep(tmp_path / "s", {name: {"seed": i} for i, name in enumerate("abc")}, metric="loss")
    for name, loss in (("a", 0.4), ("b", 0.2), ("c", 0.3)):
        finished(folder / name, top1=loss, loss=loss)
    text = shown(capsys, folder)
    assert column(text, "run") == ["b", "c", "a"]
    assert column(text, "loss") == ["0.2000", "0.3000", "0.4000"]


def test_a_sweeps_metric_ranks(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    folder = sweep(tmp_path / "s", {"a": {}, "b": {}}, metric="macro_f1")
    finished(folder / "a", top1=0.9, macro_f1=0.1)
    finished(folder / "b", top1=0.1, macro_f1=0.9)
    assert column(shown(capsys, folder), "run") == ["b", "a"]


def test_runs_without_a_metric_come_last_ordered_by_state(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    folder = sweep(tmp_path / "s", {name: {} for name in ("gone", "worst", "waits", "dead", "odd")})
    finished(folder / "worst", top1=0.0, loss=9.0)
    finished(folder / "odd", top1=None, loss=9.0)
    finished(folder / "dead", "failed")
    (folder / "waits").mkdir()
    write_record(folder / "waits", "8", "slurm")
    slurm.add("8")
    text = shown(capsys, folder)
    assert column(text, "run") == ["worst", "odd", "waits", "dead", "gone"]
    assert column(text, "state") == ["completed", "completed", "pending", "failed", "missing"]
    assert column(text, "") == ["1", "", "", "", ""]
    assert counts(text) == ["2 completed, 1 pending, 1 failed, 1 missing"]


def test_runs_of_different_images_are_not_ranked_together(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    for name, root, top1 in (("a", "flowers", 0.5), ("b", "birds", 0.9), ("c", "flowers", 0.7), ("d", "null", 0.1)):
        finished(tmp_path / "runs" / name, top1=top1)
        (tmp_path / "runs" / name / "config.yaml").write_text(f"data:\n  format: auto\n  root: {root}\nseed: 0\n")
    text = shown(capsys, tmp_path / "runs")
    parts = re.split(r"^data: (.*)\n", text, flags=re.MULTILINE)
    assert parts[1::2] == ["birds", "embedded digits", "flowers"]
    assert column(parts[6], "run") == ["c", "a"]
    assert column(parts[6], "") == ["1", "2"]
    assert counts(text) == ["4 completed"]
    found = json.loads(shown(capsys, tmp_path / "runs", "--json"))["runs"]
    assert [run["data"] for run in found] == ["birds", "embedded digits", "flowers", "flowers"]
    for name in "ab":
        (tmp_path / "runs" / name / "config.yaml").unlink()
    finished(tmp_path / "runs/d/slurm")
    (tmp_path / "runs/d/config.yaml").rename(tmp_path / "runs/d/slurm/config.yaml")
    assert re.findall(r"^data: (.*)\n", shown(capsys, tmp_path / "runs"), re.MULTILINE) == [
        "embedded digits", "flowers", "not known yet"
    ]  # fmt: skip


# Columns


def test_short_names_of_columns_are_distinct() -> None:
    keys = ["stages.head.lr", "stages.full.lr", "optim.name", "model.name", "seed", "lr", "a.seed"]
    found = status._short_names(keys)
    assert found == {
        "stages.head.lr": "head.lr", "stages.full.lr": "full.lr", "optim.name": "optim.name",
        "model.name": "model.name", "seed": "seed", "lr": "lr", "a.seed": "a.seed",
    }  # fmt: skip
    assert len(set(found.values())) == len(keys)
    assert status._short_names(["stages.head.lr", "optim.momentum"]) == {
        "stages.head.lr": "lr", "optim.momentum": "momentum"
    }  # fmt: skip


def test_what_trials_set_has_columns(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    trials: dict[str, dict[str, Any]] = {
        "a": {"stages.head.lr": 0.0001234567, "stages.full.unfreeze": ["layer4"], "seed": 0},
        "b": {"stages.full.lr": 1e-05},
    }
    text = shown(capsys, sweep(tmp_path / "s", trials))
    assert column(text, "head.lr") == ["0.0001235", ""]
    assert column(text, "full.lr") == ["", "1e-05"]
    assert column(text, "unfreeze") == ["['layer4']", ""]
    assert column(text, "seed") == ["0", ""]


def test_empty_columns_are_left_out(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    finished(tmp_path / "runs" / "a", top1=0.5, loss=1.0)
    head = shown(capsys, tmp_path / "runs").splitlines()[0].split()
    assert head == ["run", "state", "done", "top1", "job"]


def test_a_running_run_shows_its_progress_and_host(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    run_dir = finished(tmp_path / "run", "failed")
    (run_dir / "config.yaml").write_text("stages: {head: {unfreeze: head, epochs: 1}, full: {unfreeze: 1, epochs: 3}}")
    line = {"step": 6, "epoch": 1, "stage": "head", "split": "val", "top1": 0.25, "loss": 1.0, "time": 1}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line))
    slurm.add("7", "RUNNING", nodes="n[1-2]")
    text = shown(capsys, run_dir)
    for name, cell in (("run", "run"), ("state", "running"), ("done", "25%"), ("top1", "0.2500"), ("at", "head 1"),
                       ("job", "7"), ("where", "n[1-2]")):  # fmt: skip
        assert column(text, name) == [cell]


def test_the_reason_of_a_failure_is_below_the_table(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/7_0_log.out").touch()
    write_record(tmp_path / "run", "7", "slurm")
    assert "\nrun: exited without writing a status (its job is no longer in the queue)\n" in shown(
        capsys, tmp_path / "run"
    )


# Which runs


def test_a_run_by_its_own_folder_from_within(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(finished(tmp_path / "flowers", top1=0.5))
    assert column(shown(capsys, "."), "run") == ["flowers"]


def test_runs_below_a_folder_at_several_depths(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    for i, path in enumerate(("a", "b/c", "b/d/e", "b/d/f/too-deep")):
        finished(tmp_path / "runs" / path, top1=0.9 - i / 10)
    finished(tmp_path / "runs" / "a" / "code" / "inner", top1=1.0)
    names = column(shown(capsys, tmp_path / "runs"), "run")
    assert "too-deep" not in " ".join(names)
    assert [name for name in names if "inner" not in name] == ["a", "b/c", "b/d/e"]


def test_a_sweep_whose_trials_have_not_begun(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    folder = sweep(tmp_path / "s", {"a": {"seed": 0}, "b": {"seed": 1}})
    text = shown(capsys, folder)
    assert column(text, "state") == ["missing", "missing"]
    for task in (0, 1):
        (folder / "ab"[task]).mkdir()
        write_record(folder / "ab"[task], f"7_{task}", "slurm")
        slurm.add(f"7_{task}", reason=["None", "PartitionConfig"][task])
    text = shown(capsys, folder)
    assert column(text, "where") == ["", "(PartitionConfig)"]
    assert column(text, "state") == ["pending", "pending"]
    assert column(text, "job") == ["7_0", "7_1"]


def test_trials_that_are_no_longer_in_the_sweep_are_listed(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    folder = sweep(tmp_path / "s", {"a": {"seed": 0}})
    content = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**content, "earlier": {"b": {"lr": 0.5}}}))
    finished(folder / "a", top1=0.5)
    finished(folder / "b", top1=0.6)
    text = shown(capsys, folder)
    assert (column(text, "run"), column(text, "lr")) == (["b", "a"], ["0.5", ""])
    assert text.endswith("\nno longer in the sweep: b\n")
    assert [run["earlier"] for run in json.loads(shown(capsys, folder, "--json"))["runs"]] == [True, False]


def test_a_folder_without_runs_is_a_user_error(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert status.main([str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err == (
        f"launch.status: {tmp_path}/empty contains no run; a run directory has attempt.json or submitted.json\n"
    )
    assert status.main([str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path}/nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"trials": 5}', '{"trials": {}, "earlier": 5}'])
def test_a_sweep_file_that_is_not_whole_leaves_the_runs_to_be_found(
    slurm: FakeSlurm, tmp_path: Path, capsys, text: str
) -> None:
    finished(tmp_path / "s" / "a", top1=0.5)
    (tmp_path / "s" / "sweep.json").write_text(text)
    assert column(shown(capsys, tmp_path / "s"), "run") == ["a"]


# Slurm


def test_the_queue_is_that_of_those_who_submitted(slurm: FakeSlurm, tmp_path: Path, capsys, monkeypatch) -> None:
    """With --me, the jobs of another user would seem to have ended."""
    finished(tmp_path / "run", top1=0.5)
    shown(capsys, tmp_path / "run")
    record = json.loads((tmp_path / "run/submitted.json").read_text())
    (tmp_path / "run/submitted.json").write_text(json.dumps({**record, "uid": 1}))
    shown(capsys, tmp_path)
    own, other = slurm.calls("squeue")
    assert own[-1] == "--me"
    assert other[-1] == f"--user={os.getuid()},1"


def test_slurm_is_not_asked_about_runs_of_this_machine(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    """squeue's error has four lines where Slurm is installed and not set up."""
    for name in "ab":
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_record(tmp_path / "runs" / name, "4711", "local")
    slurm.refuse("squeue", "squeue: fatal: no config\nsqueue: fatal: no config\nsqueue: fatal: no config")
    assert "squeue" not in shown(capsys, tmp_path / "runs")
    assert not slurm.calls("squeue")
    write_record(tmp_path / "runs/b", "7", "slurm")
    assert shown(capsys, tmp_path / "runs").endswith(
        "\nsqueue: fatal: no config; the states of jobs are read from their files only\n"
    )


def test_a_note_says_that_slurm_does_not_answer(slurm: FakeSlurm, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "run").mkdir()
    write_record(tmp_path / "run", "7", "slurm")
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    text = shown(capsys, tmp_path / "run")
    assert column(text, "state") == ["unknown"]
    assert "\nrun: Slurm does not answer\n" in text
    assert text.endswith("Unable to contact slurm controller; the states of jobs are read from their files only\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "squeue is not on this machine; the states of jobs are read from their files only" in shown(
        capsys, tmp_path / "run"
    )


def test_a_run_that_waits_for_data(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    for name, seconds in (("a", None), ("b", 0.4), ("c", 4.1)):
        line = {"step": 1, "epoch": 1, "stage": "head", "split": "train", "seconds": 10.0}
        finished(tmp_path / name)
        more = {} if seconds is None else {"data_wait_seconds": seconds}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({**line, **more}) + "\n")
    text = shown(capsys, tmp_path)
    assert column(text, "data wait") == ["", "", "41%"]
    found = json.loads(shown(capsys, tmp_path, "--json"))["runs"]
    assert [run["data_wait"] for run in found] == [None, 0.04, 0.41]


# Why a run failed, and how long others may run


def test_a_failed_run_shows_the_last_message_the_log_and_the_state_of_its_job(
    slurm: FakeSlurm, tmp_path: Path, capsys
) -> None:
    folder = sweep(tmp_path / "s", {name: {} for name in "ab"})
    (folder / "slurm").mkdir()
    for task, name in enumerate("ab"):
        (folder / name).mkdir()
        write_record(folder / name, f"7_{task}", "slurm")
    slurm.add("7_0", "FAILED", own="8", reason="NonZeroExitCode")
    (folder / "slurm/7_0_0_log.out").write_text(
        "submitit INFO (2026-11-28) - Loading pickle: x\n"
        "distil_tl.train: 2 problems:\n  - data.root=flowers is not a folder\n  - seed must be positive\n"
        "launch: job 7_0 is FAILED, so it is not requeued\nsrun: error: n1: task 0: Exited with exit code 2\n\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=6.0\n"
    )
    finished(folder / "b", "failed")
    (folder / "slurm/7_1_0_log.out").write_text("step 5\ndistil_tl.train: the loss is not finite at step 6\n")
    slurm.account(_7_1="FAILED|1:0")
    text = shown(capsys, folder)
    assert (
        "\na: 2 problems: - data.root=flowers is not a folder - seed must be positive (job 7_0 is FAILED, "
        f"NonZeroExitCode)\n  output: {folder}/slurm/7_0_0_log.out\n"
    ) in text
    assert (
        "\nb: the loss is not finite at step 6 (job 7_1 is FAILED, exit status 1)\n"
        f"  output: {folder}/slurm/7_1_0_log.out\n"
    ) in text
    assert [call[-1] for call in slurm.calls("sacct")] == ["--jobs=7_1"], "squeue has the other one"
    (first, _) = json.loads(shown(capsys, folder, "--json"))["runs"]
    assert first["log"] == f"{folder}/slurm/7_0_0_log.out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", None),
        ("submitit INFO (x) - y\n", None),
        ("Traceback\n  File x\nValueError: wrong\n", "ValueError: wrong"),
        ("distil_tl.train: no\nlib.py:5: UserWarning: leaked\n  warnings.warn(\n", "no"),
        ("distil_tl.train: 2 problems:\n  - a\n  - b\n[rank0]: warning\n", "2 problems: - a - b"),
        ("distil-tl distil: no\nlib.py:5: UserWarning: distil_tl.train: leaked\n", "no"),
        ("distil_tl.train: of the first start\nsubmitit INFO - Starting with JobEnvironment(x)\nKilled\n", "Killed"),
        ("slurmstepd: error: Detected 1 oom_kill event\nsrun: error: n1: task 0: Out Of Memory\n",
         "srun: error: n1: task 0: Out Of Memory"),
        ("x" * 1000, "x" * 400 + "..."),
    ],
)  # fmt: skip
def test_the_last_message_of_an_output(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "log").write_text(text)
    assert last_message(tmp_path / "log") == message


def test_a_killed_job_without_a_message_shows_what_accounting_says(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    write_record(tmp_path / "run", "7", "slurm")
    (tmp_path / "run/slurm").mkdir()
    (tmp_path / "run/slurm/7_0_log.out").touch()
    slurm.account(_7="OUT_OF_MEMORY|0:125")
    assert "\nrun: exited without writing a status (job 7 is OUT_OF_MEMORY)" in shown(capsys, tmp_path / "run")


def test_a_failed_run_without_a_job_shows_the_log_of_its_rank(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    run_dir = finished(sweep(tmp_path / "s", {"run": {}}) / "run", "failed")
    (run_dir / "submitted.json").unlink()
    (run_dir / "logs").mkdir()
    for rank in (0, 1, 10):
        (run_dir / f"logs/rank-{rank}.log").write_text(f"2026-11-28 19:15:33,123 DEBUG distil_tl.train: of {rank}\n")
    assert f"\nrun: of 0\n  output: {run_dir}/logs/rank-0.log\n" in shown(capsys, tmp_path / "s")
    assert not slurm.calls("sacct")


def test_time_left(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    folder = sweep(tmp_path / "s", {name: {} for name in "abc"})
    for task, (name, state, left) in enumerate(
        (("a", "RUNNING", "1-02:30:00"), ("b", "RUNNING", "UNLIMITED"), ("c", "PENDING", "1:00:00"))
    ):
        (folder / name).mkdir()
        write_record(folder / name, f"7_{task}", "slurm")
        slurm.add(f"7_{task}", state, left=left)
    assert column(shown(capsys, folder), "left") == ["1-02:30:00", "", ""]


# For programs


def test_json(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    folder = sweep(tmp_path / "s", {"a": {"stages.head.lr": 0.1}, "b": {}})
    finished(folder / "a", top1=0.5, loss=float("nan"))
    found = json.loads(shown(capsys, folder, "--json"))
    assert found.keys() == {"folder", "metric", "note", "runs"}
    assert (found["folder"], found["metric"], found["note"]) == (str(folder), "top1", None)
    done, missing = found["runs"]
    assert done == {
        "run_dir": f"{folder}/a", "state": "completed", "progress": 1.0,
        "best": {"stage": "full", "epoch": 2, "step": 20, "top1": 0.5, "loss": None},
        "intervals": {},
        "stage": None, "epoch": None, "step": None, "job_id": "7", "restarts": 0, "host": None, "seconds": 12.5,
        "data_wait": None, "data": None, "detail": None, "slurm": None, "left": None, "remaining": None, "log": None,
        "values": {"stages.head.lr": 0.1}, "earlier": False,
    }  # fmt: skip
    assert missing["state"] == "missing"
    assert missing.keys() == done.keys()


# Watching


def test_watching_ends_when_all_runs_have_ended(slurm: FakeSlurm, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = sweep(tmp_path / "s", {"a": {}, "b": {}})
    for task, name in enumerate("ab"):
        (folder / name).mkdir()
        write_record(folder / name, f"7_{task}", "slurm")
        slurm.add(f"7_{task}")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            slurm.change("7_0", "RUNNING", nodes="n1")
        elif len(slept) == 2:
            finished(folder / "a", top1=0.5)
        elif len(slept) == 3:
            slurm.change("7_1", "COMPLETING")
        elif len(slept) == 4:
            finished(folder / "b", "failed")
            slurm.forget("7_1")
        else:
            pytest.fail("all is over")

    monkeypatch.setattr("launch.status.sleep", sleep)
    text = shown(capsys, folder, "--watch", "5")
    assert slept == [5, 5, 5, 5]
    assert counts(text) == [
        "2 pending",
        "1 running, 1 pending",
        "1 completed, 1 pending",
        "1 completed, 1 running",
        "1 completed, 1 failed",
    ]


def test_watching_ended_runs_prints_them_once(slurm: FakeSlurm, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("launch.status.sleep", lambda seconds: pytest.fail("it waits"))
    for state in ("completed", "failed", "preempted"):
        finished(tmp_path / state, state)
        shown(capsys, tmp_path / state, "--watch")


def test_ctrl_c_ends_watching_without_a_traceback(slurm: FakeSlurm, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    sweep(tmp_path / "s", {"a": {}})
    monkeypatch.setattr("launch.status.sleep", interrupted)
    assert "1 missing" in shown(capsys, tmp_path / "s", "--watch")


# The command


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "launch.status", *map(str, args)]


def test_a_closed_pipe_ends_the_command_without_an_error(slurm: FakeSlurm, tmp_path: Path) -> None:
    """As `| head -1`."""
    for i in range(300):
        finished(tmp_path / "runs" / f"{i:03d}{'x' * 200}", top1=0.5)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(tmp_path / "runs"), env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=240) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_it_begins_at_once_without_torch() -> None:
    code = "import sys, launch.status; sys.exit('torch' in sys.modules or 'submitit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
