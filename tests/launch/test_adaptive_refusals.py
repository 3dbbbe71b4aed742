"""Adaptive search: edits during a search, invalid arguments, a local search."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distil_tl.rundir.lock import Attempt
from launch import adaptive, snapshot
from tests.helpers.adaptive_jobs import (
    HERE,
    PLAIN,
    SPACE,
    STOPPED,
    Jobs,
    refusal,
    searched,
    states,
    trials,
)
from tests.helpers.fake_slurm import FakeSlurm, fake_training
from tests.helpers.paths import ROOT
from tests.helpers.ranks import processes_of

# What edits reach


def test_all_trials_run_the_code_and_the_configuration_of_the_beginning(
    slurm: FakeSlurm, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source = fake_training(tmp_path / "source", "return 0")
    monkeypatch.setattr(snapshot, "_source_root", lambda: source)
    Path("base.yaml").write_text("optim: {momentum: 0.5}")
    Path("common.yaml").write_text("{base: base.yaml, data: {root: null}}")
    Path("rates.yaml").write_text(SPACE.replace("{random", "{config: common.yaml, random"))

    def edit() -> None:
        (source / "distil_tl/train.py").write_text("# edited")
        Path("base.yaml").write_text("optim: {momentum: 0.6}")
        Path("rates.yaml").write_text("{}")

    jobs.meanwhile = {1: edit, 5: lambda: os.kill(os.getpid(), signal.SIGINT)}

    def codes() -> list[str]:
        scripts = [job["script"] for _, job in sorted(slurm.jobs.items(), key=lambda item: int(item[0]))]
        return [re.findall(r"^cd (.*) \|\| exit 2$", script, re.MULTILINE)[0] for script in scripts]

    searched("--parallel=1", returns=3)
    assert len(codes()) == 2
    Path("base.yaml").write_text("optim: {momentum: 0.5}")
    Path("rates.yaml").write_text(SPACE.replace("{random", "{config: common.yaml, random"))
    capsys.readouterr()
    searched("--parallel=1", "--trials=3")
    (own,) = set(codes())
    assert Path(own, "distil_tl/train.py").read_text() != "# edited"
    assert f"trials still run the copy in {own} (to use the current code, add --new-code)\n" in capsys.readouterr().out
    searched("--parallel=1", "--trials=4", "--new-code")
    assert [code == own for code in codes()] == [True] * 3 + [False]
    assert Path(codes()[-1], "distil_tl/train.py").read_text() == "# edited"
    configs = [yaml.safe_load((run_dir / "slurm/config.yaml").read_text()) for run_dir in trials()]
    assert [config["optim"]["momentum"] for config in configs] == [0.5] * 4


def test_the_number_of_trials_is_in_the_file_or_on_the_command_line(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    Path("rates.yaml").write_text(SPACE.replace(", count: 4", ""))
    assert refusal(capsys) == "--trials must be at least 1; without it the sweep needs `count`\n"
    searched("--trials=1")
    assert len(slurm.jobs) == 1


def test_a_search_with_another_space_is_refused(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    searched("--trials=1")
    Path("rates.yaml").write_text(SPACE.replace("1e-3, 1]", "1e-3, 2]").replace("{random", "{metric: loss, random"))
    assert refusal(capsys, "--trials=2") == (
        f"{HERE.absolute()} holds a search with another `metric` and `random`; use the earlier values, or another "
        "--dir\n"
    )
    Path("rates.yaml").write_text(SPACE)
    assert "optim.momentum: was 0.9, now 0.25" in refusal(capsys, "--trials=2", "optim.momentum=0.25")
    assert len(slurm.calls("sbatch")) == 1
    searched("--trials=2")


def test_one_search_at_a_time_in_a_folder(slurm: FakeSlurm, jobs: Jobs, monkeypatch, capsys) -> None:
    searched("--trials=1")
    Attempt(HERE, "search.json").begin(0, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        message = refusal(capsys)
    assert (
        f"{HERE.absolute()} is in use: process {os.getpid()} of this machine has been searching there since 20"
        in message
    )
    assert len(slurm.calls("sbatch")) == 1


def test_a_search_ends_when_another_process_takes_the_lock(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    """A process on another machine can't see whether this one still runs."""
    jobs.meanwhile[3] = lambda: Attempt(HERE, "search.json").begin(0, {})
    searched("--parallel=1", returns=1)
    assert "another process took over" in capsys.readouterr().err
    assert len(slurm.calls("sbatch")) == 1


# What is refused


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("seeds: [0, 1]", [], "the sweep has no `random`, which is the search space"),
        ("{random: {seed: {choice: [1]}}, count: 1, seeds: [0]}", [], "`seed` is varied twice"),
        (SPACE[:-1] + ", seeds: [0, 1]}", [], "remove `seeds`, or use launch.sweep"),
        (SPACE[:-1] + ", grid: {precision: [fp32]}}", [], "remove `grid`, or use launch.sweep"),
        (SPACE[:-1] + ", set: {seed: 5}}", [], "set: remove `seed`; each trial has its own"),
        (SPACE, ["--trials=0"], "--trials must be at least 1"),
        (SPACE, ["--parallel=0"], "--parallel must be at least 1"),
        (SPACE, ["--trials=1001"], "--trials 1001 is more than max_trials=1000"),
        (SPACE, ["seed=3"], "the sweep varies seed, and the command line sets it for all trials"),
        (SPACE, ["slurm.nods=3"], "unknown key `slurm.nods`, did you mean `nodes`?"),
        (SPACE, ["--frobnicate"], "usage: python -m launch.adaptive SWEEP.yaml"),
        ("{random: {optim.nam: {choice: [sgd]}}, count: 2}", [], "unknown key `optim.nam`, did you mean `name`?"),
        ("{random: {optim.name: {choice: [sgd, adamw, sgdd]}}, count: 2}", [], "in optim.name=sgdd seed=0"),
        ("{random: {stages.head.lr: {uniform: [-1, 1]}}, count: 2}", [], "1 of 2 trials can't work"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_proposed(
    slurm: FakeSlurm, jobs: Jobs, capsys, text: str, args: list[str], message: str
) -> None:
    Path("rates.yaml").write_text(text)
    assert message in refusal(capsys, *args)
    assert not Path("sweeps").exists()


def test_an_invalid_trial_ends_the_search_but_not_a_later_one(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    """Its images disappear after the search began."""
    for split in ("train", "val"):
        Path("flowers", split, "rose").mkdir(parents=True)
    jobs.meanwhile[2] = lambda: Path("flowers").rename("gone")
    args = ["data.root=flowers", "rates.yaml", *PLAIN[1:], "--parallel=1"]
    assert adaptive.main(args) == 2
    assert "data.root=flowers is not a folder" in capsys.readouterr().err
    assert states() == {"COMPLETE": 1, "FAIL": 1}
    Path("gone").rename("flowers")
    assert adaptive.main(args) == 0
    assert states() == {"COMPLETE": 3, "FAIL": 1}


def test_without_optuna_the_message_names_the_package(
    search_file: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert refusal(capsys) == "launch.adaptive needs Optuna: pip install 'distil_tl[optuna]'\n"


# On this machine

BODY = """import signal, time, yaml
    config = yaml.safe_load(open(args[0]))
    run_dir = pathlib.Path(config["run_dir"])
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(1))
    def end(status, best=None):
        (run_dir / "summary.json").write_text(json.dumps({"status": status, "best": best}))
    with open(run_dir / "starts", "a") as file:
        file.write("x")
    while not pathlib.Path("go").exists():
        time.sleep(0.05)
        if asked:
            end("preempted")
            return 3
    end("completed", {"top1": 0.5, "loss": 1.0})
    return 0"""


@pytest.fixture
def command(search_file: Path, tmp_path: Path) -> list[str]:
    """A search with two trials at a time, which end when the file `go` exists."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom launch import adaptive, snapshot\n"
        f"snapshot._source_root = lambda: Path({str(fake_training(tmp_path / 'source', BODY))!r})\n"
        "sys.exit(adaptive.main(sys.argv[1:]))"
    )
    args = ["--cluster=local", "slurm.gpus_per_node=0", "--trials=3", "--parallel=2", "--poll=0.1"]
    return [sys.executable, "-c", code, *PLAIN, "rates.yaml", *args]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_local_search_is_stopped_and_resumed(command: list[str], number: signal.Signals) -> None:
    """By Ctrl-C, which a terminal sends to all of it, its trials are stopped; killed, it leaves them behind."""
    environ, stopped = {**os.environ, "PYTHONPATH": str(ROOT)}, number == signal.SIGINT
    with Path("stderr").open("w") as said:  # not a pipe, which trials that still run would keep open
        process = subprocess.Popen(command, env=environ, start_new_session=True, stdout=said, stderr=said)
    try:
        wait_until(lambda: len(list(HERE.glob("*/starts"))) == 2)
        os.killpg(process.pid, number) if stopped else process.kill()
        assert process.wait(timeout=240) == (3 if stopped else -9)
        assert (STOPPED in Path("stderr").read_text()) is stopped
        assert bool(processes_of(HERE.absolute())) is not stopped
        assert states() == {"RUNNING": 2}
    finally:
        Path("go").touch()
        process.kill()
    again = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    wait_until(lambda: not processes_of(HERE.absolute()))
    assert states() == {"COMPLETE": 3}
    starts = sorted(path.read_text() for path in HERE.glob("*/starts"))
    assert starts == (["x", "xx", "xx"] if stopped else ["x", "x", "x"])


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
