"""Submitting to this machine, and to a run directory that holds a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from launch import evidence, executor, snapshot, submit
from launch.records import read_record
from launch.run_status import read_status
from tests.helpers.arguments import WITHOUT_TIMM, small_args
from tests.helpers.fake_slurm import FakeSlurm, fake_training
from tests.helpers.paths import ROOT
from tests.helpers.ranks import lines, processes_of
from tests.helpers.submissions import ON_CPUS, refusal

# Jobs of this machine


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run, by --cluster debug."""
    here = tmp_path_factory.mktemp("debug")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        args = [*small_args(folder), "stages.full.epochs=0", "run_dir=run", "resume=never"]
        assert submit.main(["--cluster=debug", *args, *ON_CPUS]) == 0
    return here / "run"


def local(folder: Path, *args: str) -> list[str]:
    return [
        *small_args(folder),
        WITHOUT_TIMM,
        "stages.full.epochs=0",
        "run_dir=run",
        *ON_CPUS,
        "--cluster=local",
        *args,
    ]


def test_debug_trains_in_this_process(trained: Path) -> None:
    assert json.loads((trained / "summary.json").read_text())["status"] == "completed"
    assert json.loads((trained / "attempt.json").read_text())["pid"] == os.getpid()
    assert (read_record(trained) or {})["cluster"] == "debug"


def test_a_local_run_with_two_tasks(slurm: FakeSlurm, folder: Path, capsys) -> None:
    Path("images").symlink_to(folder)  # a relative path, from the code's own folder
    assert submit.main(local(folder, "data.root=images", "slurm.tasks_per_node=2")) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("completed", 2)
    (code,) = Path("run/code").absolute().iterdir()
    environment = json.loads(Path("run/env.json").read_text())
    assert environment["git"] == json.loads((code / "distil_tl/snapshot.json").read_text())
    assert ", 2 local processes" in capsys.readouterr().out
    assert not slurm.calls("sbatch")


@pytest.mark.parametrize("status", [1, 2])
def test_a_local_run_that_fails(
    slurm: FakeSlurm, folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Its status is that of training, and the message says where its output is."""
    source = fake_training(tmp_path / "source", f"sys.stderr.write('why it failed'); return {status}")
    monkeypatch.setattr(snapshot, "_source_root", lambda: source)
    assert submit.main(local(folder)) == status
    said = capsys.readouterr().err
    (output,) = re.findall("launch: the job failed; its output is in (.*)\n", said)
    assert "why it failed" in Path(output).read_text()


def test_a_local_run_that_dies(slurm: FakeSlurm, folder: Path, capsys, monkeypatch) -> None:
    assert submit.main(local(folder, "slurm.setup=['exit 1']")) == 1
    assert "launch: the job failed; its output is in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "gpus", "seen", "has_gpus"),
    [
        (None, 2, "0,1", True),
        (None, 2, "", False),
        ("3", 0, "", True),
        ("GPU-a b,7", 2, "GPU-a b,7", True),
        ("", 1, "", True),
    ],
)
def test_a_local_run_is_set_up_as_by_sbatch(
    slurm: FakeSlurm, folder: Path, tmp_path: Path, monkeypatch, given: str | None, gpus: int, seen: str, has_gpus: bool
) -> None:
    """In bash, where a line that fails is not the end; and on the GPUs that the user chose, if there are any."""
    monkeypatch.setattr(executor, "has_gpu_files", lambda: has_gpus)
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    told = tmp_path / "told"
    body = f"pathlib.Path({str(told)!r}).write_text(json.dumps([os.environ['CUDA_VISIBLE_DEVICES'], os.environ['X']]))"
    source = fake_training(
        tmp_path / "source", f"if os.environ.get('SUBMITIT_LOCAL_GLOBALID') == '0': {body}\n    return 0"
    )
    monkeypatch.setattr(snapshot, "_source_root", lambda: source)
    setup = "slurm.setup=['true', '[[ bash == b* ]] && words=(\"an array\") && export X=$words']"
    assert submit.main([*local(folder, setup), f"slurm.gpus_per_node={gpus}"]) == 0
    assert json.loads(told.read_text()) == [seen, "an array"]


def test_more_gpus_than_cuda_visible_devices_allows(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    message = refusal(capsys, "--cluster=local", "slurm.gpus_per_node=2")
    assert message == (
        "slurm.gpus_per_node=2, but CUDA_VISIBLE_DEVICES=3 allows only 1; use a smaller number, or unset it\n"
    )
    assert "allows only 1" not in refusal(capsys, "--cluster=slurm", "slurm.gpus_per_node=2", "slurm.nodes=0")


def test_the_best_evaluation_is_shown_before_the_end(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """From the checkpoint, as the end of metrics.jsonl need not hold it."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (tmp_path / "run/summary.json").unlink()
    monkeypatch.setattr(evidence, "TAIL", 10)
    assert read_status(tmp_path / "run", {}).best == json.loads((trained / "summary.json").read_text())["best"]


def wait_for_steps(run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def saved_and_gone(run_dir: Path) -> None:
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "preempted"
    assert "ended_at" in json.loads((run_dir / "attempt.json").read_text())
    assert (run_dir / "checkpoints/last").exists()
    assert processes_of(run_dir) == []


def test_ctrl_c_in_a_terminal_lets_the_run_save(slurm: FakeSlurm, folder: Path, tmp_path: Path) -> None:
    """A terminal signals all processes, submitit's controller too, which would kill the ranks a second later."""
    body = """import signal, time
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.append(1))
    run_dir = pathlib.Path(args[0]).parents[1]
    (run_dir / "begun").touch()
    while not asked:
        time.sleep(0.05)
    time.sleep(2.5)
    (run_dir / "saved").touch()
    return 3"""
    code = (
        "import sys\nfrom pathlib import Path\nfrom launch import snapshot, submit\n"
        f"snapshot._source_root = lambda: Path({str(fake_training(tmp_path / 'source', body))!r})\n"
        "sys.exit(submit.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *local(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not Path("run/begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 3
    assert said == "launch: the job was stopped; run the same command to resume\n"
    assert Path("run/saved").exists()
    assert processes_of(Path("run").absolute()) == []


def test_an_interrupt_of_the_command_alone_ends_its_job(slurm: FakeSlurm, folder: Path, capsys) -> None:
    """As by `kill -INT`. submitit's `cancel` would end only a shell, and training would continue."""

    def interrupt() -> None:
        wait_for_steps(Path("run"), 3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert submit.main(local(folder, "stages.head.epochs=300")) == 3
    thread.join()
    assert "the job was stopped" in capsys.readouterr().err
    saved_and_gone(Path("run").absolute())


# A run directory with a run


@pytest.fixture
def completed(trained: Path, slurm: FakeSlurm) -> list[str]:
    """The arguments of a run that is complete, in a copy of its directory; submitted to Slurm."""
    shutil.copytree(trained, "run", symlinks=True)
    args = yaml.safe_load(Path("run/config.yaml").read_text())
    Path("config.yaml").write_text(json.dumps({**args, "run_dir": "run", "resume": "auto"}))
    return ["config.yaml"]


def test_a_completed_run_is_not_submitted_again(completed: list[str], slurm: FakeSlurm, capsys) -> None:
    assert submit.main(completed) == 0
    assert f"{Path('run').absolute()} is already completed" in capsys.readouterr().out
    assert submit.main([*completed, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert not slurm.calls("sbatch")
    assert Path("run/summary.json").exists()


def test_a_run_of_another_configuration_is_refused_at_once(completed: list[str], slurm: FakeSlurm, capsys) -> None:
    assert submit.main([*completed, "optim.momentum=0.5"]) == 2
    assert "run holds a run of another configuration" in capsys.readouterr().err
    assert not slurm.calls("sbatch")


def test_resume_never_applies_only_to_the_submission(completed: list[str], slurm: FakeSlurm, capsys) -> None:
    """A job that was requeued finds its own checkpoints, and would refuse them."""
    assert submit.main([*completed, "resume=never"]) == 2
    assert "resume=never, but" in capsys.readouterr().err
    assert submit.main([*completed, "resume=never", "run_dir=other"]) == 0
    assert yaml.safe_load(Path("other/slurm/config.yaml").read_text())["resume"] == "auto"
