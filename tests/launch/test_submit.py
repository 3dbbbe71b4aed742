"""Submitting one run: what is refused, what sbatch gets, and what the job then runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from distil_tl.models import transfer
from distil_tl.rundir import directory as rundir
from distil_tl.rundir.lock import Attempt
from launch import snapshot, submit, sweep
from launch.records import read_record, write_record
from tests.helpers.fake_slurm import FakeSlurm, fake_training

PLAIN = ["data.root=null", "model.name=shufflenet_v2_x0_5", "model.weights=none", "run_dir=runs/flowers"]
HERE = ["slurm.gpus_per_node=0", "slurm.cpus_per_task=1"]


def submitted(*args: str) -> None:
    assert submit.main([*PLAIN, *args]) == 0


def refusal(capsys, *args: str) -> str:
    assert submit.main([*PLAIN, *args]) == 2
    err: str = capsys.readouterr().err
    assert err.startswith("launch.submit: ")
    return err.removeprefix("launch.submit: ")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What sbatch gets


def test_a_dry_run_prints_the_script_and_creates_nothing(slurm: FakeSlurm, capsys) -> None:
    submitted(
        "--dry-run", "slurm.nodes=2", "slurm.gpus_per_node=4", "slurm.time=1:30:00", "slurm.mem=64GB",
        "slurm.partition=gpu", "slurm.setup=[module load cuda]", "slurm.extra.reservation=course",
    )  # fmt: skip
    text = capsys.readouterr().out
    for option in (
        "nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=8", "time=90", "mem=64GB", "partition=gpu",
        "signal=USR2@120", "reservation=course", "requeue", "open-mode=append", "job-name=flowers",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in text
    setup = text.partition("# setup\n")[2]
    assert setup.index("module load cuda") < setup.index("export PYTHONPATH=") < setup.index("cd ")
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text
    assert "wckey" not in text
    assert not list(Path().iterdir())
    assert not slurm.calls("sbatch")


def test_a_dry_run_is_the_script_that_is_submitted(slurm: FakeSlurm, capsys) -> None:
    submitted("--dry-run")
    printed = capsys.readouterr().out
    submitted()
    assert slurm.jobs["7"]["script"].strip() == printed.strip()


def test_a_dry_run_says_what_else_it_has_to_say_on_standard_error(slurm: FakeSlurm, capsys) -> None:
    """`--dry-run > job.sh` is a script."""
    Path("runs/flowers").mkdir(parents=True)
    write_record(Path("runs/flowers"), "5", "slurm")
    slurm.refuse("squeue", "no controller")
    submitted("--dry-run")
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n")
    assert "can't check with Slurm whether a job is using" in said.err


def test_there_is_no_script_for_other_clusters(slurm: FakeSlurm, capsys) -> None:
    for cluster in ("local", "debug"):
        assert "--cluster " + cluster + " has none" in refusal(capsys, "--dry-run", f"--cluster={cluster}", *HERE)
    assert not list(Path().iterdir())


def test_what_a_submission_leaves_in_the_run_directory(slurm: FakeSlurm, capsys) -> None:
    before = os.umask(0o022)
    try:
        submitted("seed=5")
    finally:
        os.umask(before)
    run_dir = Path("runs/flowers").absolute()
    found = read_record(run_dir)
    assert found is not None
    assert (found["job_id"], found["cluster"]) == ("7", "slurm")
    saved = yaml.safe_load((run_dir / "slurm/config.yaml").read_text())
    assert (saved["seed"], saved["run_dir"]) == (5, str(run_dir))
    assert "slurm" not in saved
    assert {path.name for path in (run_dir / "slurm").iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "7_submission.sh", "7_submitted.pkl"
    }  # fmt: skip
    assert stat.S_IMODE((run_dir / "slurm").stat().st_mode) == 0o700, "pickles run what is in them"
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"submitted job 7: {run_dir}, 1 node x 1 GPU, time limit 24:00:00",
        f"monitor with: python -m launch.status {run_dir}",
        f"output: {run_dir}/slurm/7_TASK_log.out",
    ]


def test_paths_mean_what_they_mean_here(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from submitit.core.utils import DelayedSubmission

    for split in ("train", "val"):
        Path("flowers", split, "rose").mkdir(parents=True)
    submitted("data.root=flowers", "run_dir=../elsewhere/run")
    run_dir = tmp_path / "elsewhere/run"
    saved = yaml.safe_load((run_dir / "slurm/config.yaml").read_text())
    assert saved["data"]["root"] == "flowers"
    assert Path(saved["run_dir"]).resolve() == run_dir
    training = DelayedSubmission.load(run_dir / "slurm/7_submitted.pkl").function
    assert training.cwd == str(tmp_path / "here")


def test_a_run_directory_with_odd_characters(slurm: FakeSlurm, capsys) -> None:
    submitted('run_dir=runs/it\'s a $HOME "run"')
    script = slurm.jobs["7"]["script"]
    (line,) = re.findall("^cd .*$", script, re.MULTILINE)
    found = subprocess.run(["bash", "-c", f"{line}; pwd"], capture_output=True, text=True, check=True).stdout
    assert str(Path('runs/it\'s a $HOME "run"').absolute()) in found
    assert "contains %, which Slurm replaces in file names" in refusal(capsys, "run_dir=runs/%j")


# What the job then runs


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_queued_job_runs_the_code_that_was_submitted(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe_path: str
) -> None:
    """The script in a real bash, though the code was edited, and other packages of the same names are at hand.

    With PYTHONSAFEPATH Python does not look in the current folder.
    """
    elsewhere, told = tmp_path / "elsewhere", tmp_path / "told.json"
    for package in snapshot.PACKAGES:
        (elsewhere / package).mkdir(parents=True)
        (elsewhere / package / "__init__.py").write_text("raise AssertionError('another package')")
    source = fake_training(
        tmp_path / "source",
        "import launch.task\n"
        "    found = [__file__, launch.task.__file__, os.getcwd(), args, os.environ['OMP_NUM_THREADS']]\n"
        f"    pathlib.Path({str(told)!r}).write_text(json.dumps(found))\n    return 0",
    )
    monkeypatch.setattr(snapshot, "_source_root", lambda: source)
    submitted()
    (source / "distil_tl/train.py").write_text("raise AssertionError('edited since')")
    (source / "launch/task.py").write_text("raise AssertionError('edited since')")

    script = tmp_path / "script.sh"
    script.write_text(slurm.jobs["7"]["script"])
    environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "PYTHONPATH": str(elsewhere)}
    environ["PYTHONSAFEPATH"] = safe_path
    del environ["OMP_NUM_THREADS"]
    ran = subprocess.run(
        ["bash", str(script)], cwd=elsewhere, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    train, job, cwd, args, threads = json.loads(told.read_text())
    run_dir = tmp_path / "here/runs/flowers"
    (code,) = (run_dir / "code").iterdir()
    assert (train, job) == (f"{code}/distil_tl/train.py", f"{code}/launch/task.py")
    assert (cwd, args, threads) == (str(tmp_path / "here"), [str(run_dir / "slurm/config.yaml")], "1")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code to take snapshots of."""
    for package in snapshot.PACKAGES:
        (tmp_path / "source" / package / "__pycache__").mkdir(parents=True)
        (tmp_path / "source" / package / "__pycache__/a.cpython-311.pyc").write_bytes(b"old")
        (tmp_path / "source" / package / "a.py").write_text(f"# {package}")
    (tmp_path / "source/distil_tl/rundir").mkdir()
    shutil.copy(rundir.__file__, tmp_path / "source/distil_tl/rundir/directory.py")
    (tmp_path / "source/launch/page.html").write_text("<p>")
    monkeypatch.setattr(snapshot, "_source_root", lambda: tmp_path / "source")
    monkeypatch.setattr(rundir, "git_state", lambda: {"commit": "c0ffee", "dirty": True})
    return tmp_path / "source"


def test_a_snapshot_is_the_code_without_caches_and_knows_its_commit(source: Path, tmp_path: Path) -> None:
    code = snapshot.take_snapshot(tmp_path / "run")
    assert code.parent == tmp_path / "run/code"
    assert content(code).keys() == {
        "distil_tl/a.py", "distil_tl/rundir/directory.py", "distil_tl/snapshot.json", "launch/a.py", "launch/page.html"
    }  # fmt: skip
    assert (code / "launch/a.py").read_text() == "# launch"
    spec = importlib.util.spec_from_file_location("copied", code / "distil_tl/rundir/directory.py")
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    sys.modules["copied"] = copied  # dataclasses look there
    try:
        spec.loader.exec_module(copied)
    finally:
        del sys.modules["copied"]
    assert copied.git_state() == {"commit": "c0ffee", "dirty": True}


def test_a_snapshot_never_changes(source: Path, tmp_path: Path) -> None:
    """Jobs that wait run it, and another submission must not take it from under them."""
    first = snapshot.take_snapshot(tmp_path / "run")
    (first / "mark").touch()
    before = content(first)
    assert snapshot.take_snapshot(tmp_path / "run") == first
    (source / "launch/a.py").write_text("# edited")
    second = snapshot.take_snapshot(tmp_path / "run")
    assert second != first
    assert content(first) == before
    assert (second / "launch/a.py").read_text() == "# edited"
    (source / "launch/a.py").rename(source / "launch/b.py")
    assert snapshot.snapshot_path(tmp_path / "run") not in (first, second)


@pytest.mark.parametrize("command", [submit.main, sweep.main])
def test_an_edit_while_a_job_is_submitted_comes_too_late(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], int]
) -> None:
    """Not so that its folder has another name than the job was told, nor so that half of the edit is in it."""
    edited = fake_training(tmp_path / "source", "return 0") / "distil_tl/train.py"
    before, read = edited.read_bytes(), Path.read_bytes

    def read_and_edit(path: Path) -> bytes:
        content = read(path)
        if path == edited:
            path.write_bytes(content + b"# edited\n")
        return content

    monkeypatch.setattr(snapshot, "_source_root", lambda: tmp_path / "source")
    monkeypatch.setattr(Path, "read_bytes", read_and_edit)
    Path("seeds.yaml").write_text("seeds: [0, 1]")
    args = PLAIN if command is submit.main else [arg for arg in PLAIN if not arg.startswith("run_dir")]
    assert command([*args, *(["seeds.yaml"] if command is sweep.main else [])]) == 0
    (code,) = {line for job in slurm.jobs.values() for line in re.findall("^cd (.*)$", job["script"], re.MULTILINE)}
    assert read(Path(code) / "distil_tl/train.py") == before


def test_two_submissions_at_once_share_a_snapshot(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def slower(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        snapshot.take_snapshot(tmp_path / "run")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slower)
    code = snapshot.take_snapshot(tmp_path / "run")
    assert list((tmp_path / "run/code").iterdir()) == [code], "nothing half made is left"
    assert len(content(code)) == 5


# What sbatch says


def test_a_refusal_is_passed_on_and_nothing_is_recorded(slurm: FakeSlurm, capsys) -> None:
    run_dir = Path("runs/flowers")
    run_dir.mkdir(parents=True)
    (run_dir / "summary.json").write_text('{"status": "preempted"}')
    slurm.refuse("sbatch", "sbatch: error: invalid partition specified: gpuu")
    assert submit.main([*PLAIN, "slurm.partition=gpuu"]) == 2
    said = capsys.readouterr()
    assert "launch.submit: sbatch refused the job: sbatch: error: invalid partition specified: gpuu\n" in said.err
    assert "Traceback" not in said.err
    assert "submitted" not in said.out
    assert read_record(run_dir) is None
    assert (run_dir / "summary.json").exists()
    assert slurm.jobs == {}


@pytest.mark.parametrize("within", [True, False])
def test_a_job_submitted_from_within_a_job_has_nothing_of_that_one(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """As from a notebook: `srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are ...`."""
    script = (slurm.folder / "sbatch").read_text()
    (slurm.folder / "sbatch").write_text(script.replace("\n", f"\nenv > {tmp_path}/env\n", 1))
    given = {"SLURM_MEM_PER_CPU": "100", "SLURM_CONF": "here", "SBATCH_PARTITION": "gpu"}
    given |= {"SLURM_JOB_ID": "5"} if within else {}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    submitted()
    found = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    lost = {"SLURM_JOB_ID", "SLURM_MEM_PER_CPU"} if within else set()
    assert {name: found.get(name) for name in given} == {k: None if k in lost else v for k, v in given.items()}
    assert {name: os.environ.get(name) for name in given} == given


def test_an_answer_without_a_job_number(slurm: FakeSlurm, capsys) -> None:
    (slurm.folder / "sbatch").write_text("#!/bin/sh\necho welcome\n")
    assert "sbatch printed no job id" in refusal(capsys)


def test_a_submission_puts_an_end_to_what_the_last_attempt_said(slurm: FakeSlurm) -> None:
    run_dir = Path("runs/flowers")
    run_dir.mkdir(parents=True)
    (run_dir / "summary.json").write_text('{"status": "failed"}')
    submitted()
    assert not (run_dir / "summary.json").exists()


# What is refused before


def test_all_that_cannot_work_is_listed_together(slurm: FakeSlurm, capsys, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    message = refusal(
        capsys, "slurm.cpus_per_task=0", "slurm.time=1", "data.root=nowhere", "optim.name=sgdd", "model.weights=default"
    )
    assert message.startswith("6 problems:\n")
    for part in (
        "slurm.cpus_per_task must be at least 1",
        "so with slurm.time=1 the job could be stopped as soon as it starts",
        "data.root=nowhere is not a folder",
        "sgdd",
        "there is no sbatch on this machine; submit from a login node, or use --cluster local",
        "compute nodes may have no network",
    ):
        assert part in message
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["slurm.nodes=3", "slurm.gpus_per_node=5"], "can't be divided evenly among 15 processes"),
        (["--cluster=local", "slurm.nodes=2"], "slurm.nodes=2 with --cluster local, which uses only this machine"),
        (["--cluster=debug", "slurm.gpus_per_node=2"], "--cluster debug is one process"),
        (["--cluster=local", "distributed.device=cuda", "distributed.backend=nccl"], "torch sees no CUDA device"),
        (["slurm.nods=2"], "unknown key `slurm.nods`, did you mean `nodes`?"),
        (["--frobnicate"], "can't read the argument '--frobnicate'"),
    ],
)
def test_what_cannot_work_is_refused(slurm: FakeSlurm, capsys, args: list[str], message: str) -> None:
    if "cuda" in message.lower() and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in refusal(capsys, *args)
    assert not list(Path().iterdir())


def test_an_unknown_cluster_is_an_error_of_usage(slurm: FakeSlurm) -> None:
    with pytest.raises(SystemExit) as ended:
        submit.main([*PLAIN, "--cluster=pbs"])
    assert ended.value.code == 2


def test_a_login_node_needs_no_gpu(slurm: FakeSlurm) -> None:
    submitted("distributed.device=cuda", "distributed.backend=nccl")
    saved = yaml.safe_load(Path("runs/flowers/slurm/config.yaml").read_text())["distributed"]
    assert (saved["device"], saved["backend"]) == ("cuda", "nccl")


def test_what_is_wrong_with_devices_on_any_machine_is_refused(slurm: FakeSlurm, capsys) -> None:
    assert "distributed.device is 'gpu'" in refusal(capsys, "distributed.device=gpu")
    assert "needs CUDA devices" in refusal(capsys, "distributed.device=cpu", "distributed.backend=nccl")


def test_weights_that_nodes_could_not_fetch(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "missing_weights", lambda config: "https://weights")
    message = refusal(capsys)
    assert "the weights of shufflenet_v2_x0_5 (https://weights) are not on this machine" in message
    assert "distil-tl prefetch" in message
    submitted("slurm.nodes_download=true", "run_dir=runs/other")


def test_without_submitit_it_says_how_to_get_it(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "launch needs submitit: pip install 'distil_tl[slurm]'" in refusal(capsys)
    assert not list(Path().iterdir())


# Who works in the run directory


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_a_job_that_waits_or_runs_there(slurm: FakeSlurm, capsys, state: str) -> None:
    submitted()
    slurm.change("7", state)
    assert (
        f"job 7 ({state}) is using {Path('runs/flowers').absolute()}; wait until it ends, run `scancel 7`"
        in refusal(capsys)
    )
    assert len(slurm.calls("sbatch")) == 1
    submitted("run_dir=runs/other")


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", None])
def test_a_job_that_has_ended_is_in_nobodys_way(slurm: FakeSlurm, state: str | None) -> None:
    submitted()
    if state is None:
        slurm.forget("7")
    else:
        slurm.change("7", state)
    submitted()
    assert (read_record(Path("runs/flowers")) or {})["job_id"] == "8"


def test_a_job_of_a_batch_script_is_known_by_its_attempt(slurm: FakeSlurm, capsys) -> None:
    Path("runs/flowers").mkdir(parents=True)
    Attempt(Path("runs/flowers")).begin(0, {"SLURM_JOB_ID": "9"})
    attempt = json.loads(Path("runs/flowers/attempt.json").read_text())
    Path("runs/flowers/attempt.json").write_text(json.dumps({**attempt, "process": "of a node"}))
    slurm.add("5_2", "RUNNING", own="9", nodes="n1")
    assert "job 9 (RUNNING) is using" in refusal(capsys)
    slurm.forget("5_2")
    submitted()


def test_a_process_of_this_machine_is_known_too(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    Path("runs/flowers").mkdir(parents=True)
    Attempt(Path("runs/flowers")).begin(0, {})
    monkeypatch.setattr("distil_tl.rundir.lock.os.getpid", lambda: -1)
    assert "is in use: process" in refusal(capsys)


def test_a_job_of_this_machine_is_known_before_it_trains(slurm: FakeSlurm, capsys) -> None:
    Path("runs/flowers").mkdir(parents=True)
    code = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, "submitit.local._local"])
    try:
        write_record(Path("runs/flowers"), str(process.pid), "local")
        assert f"local job {process.pid} is using" in refusal(capsys)
    finally:
        process.kill()
        process.wait()
    submitted()


def test_when_slurm_cannot_be_asked_it_goes_on_with_a_warning(slurm: FakeSlurm, capsys) -> None:
    submitted()
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    submitted()
    assert "can't check with Slurm whether a job is using" in capsys.readouterr().err
