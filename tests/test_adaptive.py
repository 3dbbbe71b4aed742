"""The search: proposing, watching, pruning; and what becomes of it when it, its trials or Slurm come to an end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml

from distil_tl.attempt import Attempt
from launch import adaptive, search, snapshot, status, sweep
from launch.records import read_record
from tests.fake_slurm import ENDED, FakeSlurm, fake_training
from tests.ranks import lines
from tests.test_torchrun import processes_of

ROOT = Path(__file__).parents[1]
PLAIN = ["data.root=null", "model.name=shufflenet_v2_x0_5", "model.weights=none"]
SPACE = "{random: {stages.head.lr: {log_uniform: [1e-3, 1]}, optim.name: {choice: [sgd, adamw]}}, count: 4}"
HERE = Path("sweeps/rates")
STOPPED = "the search was stopped, and the same command goes on with it"
Curve = Callable[[dict[str, Any]], list[float]]


class Killed(BaseException):
    """What nobody catches."""


class Jobs:
    """What goes on while the search sleeps: jobs begin, evaluate once a look, and end."""

    def __init__(self, slurm: FakeSlurm, curve: Curve, end: str = "completed", metric: str = "top1") -> None:
        self.slurm, self.curve, self.end, self.metric = slurm, curve, end, metric
        self.looks = self.most = 0
        self.meanwhile: dict[int, Callable[[], object]] = {}  # by the number of the look

    def sleep(self, seconds: float) -> None:
        self.looks += 1
        assert self.looks < 200, "it does not end"
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


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """And a current folder with `rates.yaml` alone."""
    fake = FakeSlurm(tmp_path / "slurm-bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SUBMITIT_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH"):
            monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("rates.yaml").write_text(SPACE)
    return fake


@pytest.fixture
def jobs(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """All alike, unless a test gives them another `curve`."""
    found = Jobs(slurm, lambda values: [0.5, 0.6])
    monkeypatch.setattr(search, "time", SimpleNamespace(sleep=found.sleep))
    return found


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
    """The trials, as Optuna has them."""
    backend = optuna.storages.journal.JournalFileBackend(str(HERE / "optuna.log"))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    return list(study.get_trials())


def states() -> Counter[str]:
    return Counter(trial.state.name for trial in stored())


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
    assert said[-1] == f"all of them: python -m launch.status {HERE.absolute()}"
    assert status.main([str(HERE)]) == 0
    assert "\n6 completed\n" in capsys.readouterr().out
    for trial in stored():
        assert list(trial.intermediate_values) == [0, 1]


def test_a_larger_number_of_trials_goes_on_with_the_search(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    searched()
    assert states() == {"COMPLETE": 4}, "the sweep's count"
    searched()
    assert len(slurm.calls("sbatch")) == 4
    searched("--trials=6")
    assert states() == {"COMPLETE": 6}
    rates = [trial.user_attrs["values"]["stages.head.lr"] for trial in stored()]
    assert len(set(rates)) == 6, "one that goes on draws no number again"


def test_the_same_search_proposes_the_same_in_one_go_and_in_two(slurm: FakeSlurm, jobs: Jobs) -> None:
    searched("--parallel=1", "--trials=3")
    searched("--parallel=1", "--trials=5")
    there = [trial.user_attrs["values"] for trial in stored()]
    HERE.rename("sweeps/there")
    searched("--parallel=1", "--trials=5")
    assert [trial.user_attrs["values"] for trial in stored()] == there


# Pruning


@pytest.mark.parametrize(("metric", "good", "bad"), [("top1", 0.9, 0.1), ("loss", 0.1, 0.9)])
def test_weak_trials_are_ended_early(
    slurm: FakeSlurm, jobs: Jobs, metric: str, good: float, bad: float, capsys
) -> None:
    Path("rates.yaml").write_text(SPACE.replace("{random", f"{{metric: {metric}, random"))
    jobs.metric = metric
    jobs.curve = lambda values: [good if values["seed"] < search.STARTUP else bad] * 4
    searched("--trials=8", "--parallel=1")
    assert states() == {"COMPLETE": 5, "PRUNED": 3}
    pruned = [run_dir for run_dir in trials() if values_of(run_dir)["seed"] >= search.STARTUP]
    for run_dir in pruned:
        job = (read_record(run_dir) or {})["job_id"]
        assert slurm.jobs[job]["state"] == "CANCELLED"
        assert len(lines(run_dir)) == 1
        assert json.loads((run_dir / "pruned.json").read_text()) == {"after": 1, "stage": "head"}
    assert f"best: {metric} {good:.4f}" in capsys.readouterr().out
    assert status.main([str(HERE)]) == 0
    assert "\n5 completed, 3 pruned\n" in capsys.readouterr().out


def weak(values: dict[str, Any]) -> list[float]:
    return [0.9 if values["seed"] < search.STARTUP else 0.1] * 4


def test_a_search_killed_before_it_ended_a_pruned_job_ends_it_later(
    slurm: FakeSlurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.curve = weak

    def kill(ids: list[str]) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(search, "cancel", kill)
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
    after = search.STARTUP * (told + 2) + 5
    jobs.meanwhile[after] = lambda: slurm.refuse("scancel", None)
    searched("--trials=6", "--parallel=1")
    assert states() == {"COMPLETE": 5, "PRUNED": 1}
    assert slurm.jobs["12"]["state"] == "CANCELLED"
    assert "launch: scancel: Unable to contact slurm controller; trying again later" in capsys.readouterr().err


# Ends of the search


@pytest.mark.parametrize("place", ["draw_value", "Driver.launch", "launch_trials", "Driver.look", "Driver.tell"])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_search_that_is_killed_anywhere_goes_on(
    slurm: FakeSlurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, place: str, calls: int
) -> None:
    """As it calls that, for the first time or for a later one."""
    owner, _, name = place.rpartition(".")
    target: Any = getattr(search, owner) if owner else search
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


def test_ctrl_c_leaves_slurms_jobs_alone(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    jobs.meanwhile[2] = lambda: os.kill(os.getpid(), signal.SIGINT)
    searched("--parallel=2", returns=3)
    assert capsys.readouterr().err == f"launch: {STOPPED}; its jobs go on\n"
    assert [job["state"] for job in slurm.jobs.values()] == ["RUNNING"] * 2
    assert "ended_at" in json.loads((HERE / "search.json").read_text())
    searched("--parallel=2")
    assert states() == {"COMPLETE": 4}
    assert len(slurm.calls("sbatch")) == 4


def test_ctrl_c_while_a_job_is_submitted_comes_when_that_is_written_down(
    slurm: FakeSlurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = sweep.launch_trials

    def interrupt(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        code = "import signal, sys; sys.exit(signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "sbatch is not hit either"
        return submit(*args)

    monkeypatch.setattr(search, "launch_trials", interrupt)
    searched("--parallel=1", returns=3)
    assert len(trials()) == len(slurm.calls("sbatch")) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_full_disk_cut_off_the_storage_is_let_go(slurm: FakeSlurm, jobs: Jobs) -> None:
    searched("--trials=2")
    whole = (HERE / "optuna.log").read_bytes()
    (HERE / "optuna.log").write_bytes(whole + whole.splitlines()[-1][:9])
    searched("--trials=3")
    assert states() == {"COMPLETE": 3}


# Ends of trials


def test_trials_that_fail_are_no_end_of_the_search(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    jobs.meanwhile[2] = lambda: slurm.change("8", "FAILED")
    jobs.meanwhile[3] = lambda: slurm.change("9", "CANCELLED")  # by hand
    searched("--parallel=3")
    assert states() == {"COMPLETE": 2, "FAIL": 2}
    said = capsys.readouterr().out
    assert "trial 1: failed: it ended without a word (job 8 is FAILED)\n" in said
    assert "trial 2: failed: cancelled\n" in said


@pytest.mark.parametrize(("end", "curve"), [("failed", [0.5]), ("completed", []), ("completed", [None])])
def test_a_search_in_which_all_fail_is_a_fault(
    slurm: FakeSlurm, jobs: Jobs, capsys, end: str, curve: list[Any]
) -> None:
    """Or that evaluate nothing, or nothing that is a number."""
    jobs.end, jobs.curve = end, lambda values: curve
    searched("--trials=2", returns=1)
    assert states() == {"FAIL": 2}
    assert "no trial was completed\n" in capsys.readouterr().out


def test_a_preempted_trial_comes_back(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
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
    assert "launch: squeue: no controller; asking again later\n" in capsys.readouterr().err


def test_sbatch_that_refuses_for_a_while(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    """A limit on jobs, say, while others are there to wait for."""
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


# What edits reach


def test_all_trials_run_the_code_and_the_configuration_of_the_beginning(
    slurm: FakeSlurm, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source = fake_training(tmp_path / "source", "return 0")
    monkeypatch.setattr(snapshot, "_source", lambda: source)
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
        return [re.findall("^cd (.*)$", script, re.MULTILINE)[0] for script in scripts]

    searched("--parallel=1", returns=3)
    assert len(codes()) == 2
    Path("base.yaml").write_text("optim: {momentum: 0.5}")
    Path("rates.yaml").write_text(SPACE.replace("{random", "{config: common.yaml, random"))
    capsys.readouterr()
    searched("--parallel=1", "--trials=3")
    (own,) = set(codes())
    assert Path(own, "distil_tl/train.py").read_text() != "# edited"
    assert f"and it goes on with its own, {own}; else: --new-code\n" in capsys.readouterr().out
    searched("--parallel=1", "--trials=4", "--new-code")
    assert [code == own for code in codes()] == [True] * 3 + [False]
    assert Path(codes()[-1], "distil_tl/train.py").read_text() == "# edited"
    configs = [yaml.safe_load((run_dir / "slurm/config.yaml").read_text()) for run_dir in trials()]
    assert [config["optim"]["momentum"] for config in configs] == [0.5] * 4


def test_a_search_with_another_space_is_another_one(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    searched("--trials=1")
    Path("rates.yaml").write_text(SPACE.replace("1e-3, 1]", "1e-3, 2]").replace("{random", "{metric: loss, random"))
    assert refusal(capsys, "--trials=2") == (
        f"{HERE.absolute()} holds a search with another `metric` and `random`; go back to it, or give another --dir\n"
    )
    Path("rates.yaml").write_text(SPACE)
    assert "optim.momentum: was 0.9, now 0.25" in refusal(capsys, "--trials=2", "optim.momentum=0.25")
    assert len(slurm.calls("sbatch")) == 1
    searched("--trials=2")


def test_one_search_at_a_time_in_a_folder(slurm: FakeSlurm, jobs: Jobs, monkeypatch, capsys) -> None:
    searched("--trials=1")
    Attempt(HERE, "search.json").begin(0, {})
    with monkeypatch.context() as patch:
        patch.setattr("distil_tl.attempt.os.getpid", lambda: -1)
        message = refusal(capsys)
    assert f"process {os.getpid()} of this machine has been searching in {HERE.absolute()} since 20" in message
    assert len(slurm.calls("sbatch")) == 1


def test_a_search_that_was_replaced_ends(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    """By one on another machine, as nobody can see from there whether it lives."""
    jobs.meanwhile[3] = lambda: Attempt(HERE, "search.json").begin(0, {})
    searched("--parallel=1", returns=1)
    assert "another attempt has gone on with" in capsys.readouterr().err
    assert len(slurm.calls("sbatch")) == 1


# What is refused


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("seeds: [0, 1]", [], "the sweep has no `random`, which is the space to search"),
        ("{random: {seed: {choice: [1]}}, count: 1, seeds: [0]}", [], "`seed` is varied twice"),
        (SPACE[:-1] + ", seeds: [0, 1]}", [], "leave out `seeds`, or use launch.sweep"),
        (SPACE[:-1] + ", grid: {precision: [fp32]}}", [], "leave out `grid`, or use launch.sweep"),
        (SPACE[:-1] + ", set: {seed: 5}}", [], "each trial has a `seed` of its own"),
        (SPACE, ["--trials=0"], "--trials must be at least 1"),
        (SPACE, ["--parallel=0"], "--parallel must be at least 1"),
        (SPACE, ["--poll=-1"], "--poll must be at least 0"),
        (SPACE, ["--trials=1001"], "--trials 1001 is more than max_trials=1000"),
        (SPACE, ["seed=3"], "for all trials there is a value of seed, which the sweep varies"),
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


def test_a_trial_that_cannot_work_ends_the_search_and_not_the_next(slurm: FakeSlurm, jobs: Jobs, capsys) -> None:
    """Which is found when it is submitted, as its images have gone."""
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


def test_without_optuna_it_says_how_to_get_it(slurm: FakeSlurm, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
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
def command(slurm: FakeSlurm, tmp_path: Path) -> list[str]:
    """A search of two trials at a time, which end once there is a file `go`."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom launch import adaptive, snapshot\n"
        f"snapshot._source = lambda: Path({str(fake_training(tmp_path / 'source', BODY))!r})\n"
        "sys.exit(adaptive.main(sys.argv[1:]))"
    )
    args = ["--cluster=local", "slurm.gpus_per_node=0", "--trials=3", "--parallel=2", "--poll=0.1"]
    return [sys.executable, "-c", code, *PLAIN, "rates.yaml", *args]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_search_of_this_machine_ends_and_goes_on(command: list[str], number: signal.Signals) -> None:
    """By Ctrl-C, which a terminal sends to all of it, its trials are stopped; killed, it leaves them behind."""
    environ, stopped = {**os.environ, "PYTHONPATH": str(ROOT)}, number == signal.SIGINT
    with Path("stderr").open("w") as said:  # no pipe, which trials that are left behind would keep open
        process = subprocess.Popen(command, env=environ, start_new_session=True, stdout=said, stderr=said)
    try:
        wait_until(lambda: len(list(HERE.glob("*/starts"))) == 2)
        os.killpg(process.pid, number) if stopped else process.kill()
        assert process.wait(timeout=60) == (3 if stopped else -9)
        assert (STOPPED in Path("stderr").read_text()) is stopped
        assert bool(processes_of(HERE.absolute())) is not stopped
        assert states() == {"RUNNING": 2}
    finally:
        Path("go").touch()
        process.kill()
    again = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    wait_until(lambda: not processes_of(HERE.absolute()))
    assert states() == {"COMPLETE": 3}
    starts = sorted(path.read_text() for path in HERE.glob("*/starts"))
    assert starts == (["x", "xx", "xx"] if stopped else ["x", "x", "x"])


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
