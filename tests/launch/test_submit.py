"""Submission of one run: the batch script, the run directory, the code that the job runs, the errors of sbatch."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import executor, snapshot, submit
from launch.records import read_record, write_record
from launch.slurm_config import SlurmConfig
from tests.helpers.fake_slurm import FakeSlurm, fake_training
from tests.helpers.submissions import ON_CPUS, PLAIN, refusal, submitted

# The batch script


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
    assert re.search("^srun .*--kill-on-bad-exit=1 ", text, re.MULTILINE)
    assert "wckey" not in text
    assert not list(Path().iterdir())
    assert not slurm.calls("sbatch")


def test_a_dry_run_is_the_script_that_is_submitted(slurm: FakeSlurm, capsys) -> None:
    submitted("--dry-run")
    printed = capsys.readouterr().out
    submitted()
    assert re.sub("distil_tl-[0-9a-f]{16}", "distil_tl-dry-run", slurm.jobs["7"]["script"]).strip() == printed.strip()


def test_a_dry_run_prints_warnings_on_standard_error(slurm: FakeSlurm, capsys) -> None:
    """`--dry-run > job.sh` is a script."""
    Path("runs/flowers").mkdir(parents=True)
    write_record(Path("runs/flowers"), "5", "slurm")
    slurm.refuse("squeue", "no controller")
    submitted("--dry-run")
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n")
    assert "may be training, and can't be checked: Slurm does not answer (squeue: no controller)" in said.err


def test_there_is_no_script_for_other_clusters(slurm: FakeSlurm, capsys) -> None:
    for cluster in ("local", "debug"):
        assert "--cluster " + cluster + " has none" in refusal(capsys, "--dry-run", f"--cluster={cluster}", *ON_CPUS)
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
    assert stat.S_IMODE((run_dir / "slurm").stat().st_mode) == 0o700, "loading a pickle runs code"
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"submitted job 7: {run_dir}, 1 node x 1 GPU, time limit 24:00:00",
        f"monitor with: python -m launch.status {run_dir}",
        f"output: {run_dir}/slurm/7_TASK_log.out",
    ]


def test_only_the_id_for_scripts(slurm: FakeSlurm, capsys) -> None:
    submitted("--parsable")
    said = capsys.readouterr()
    assert said.out == "7\n"
    assert said.err.startswith("submitted job 7: ")


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


# The code that the job runs


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_queued_job_runs_the_code_that_was_submitted(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe_path: str
) -> None:
    """The script in a real bash, after an edit of the code, and with other packages of the same names on the path.

    With PYTHONSAFEPATH Python does not look in the current folder.
    """
    elsewhere, told = tmp_path / "elsewhere", tmp_path / "told.json"
    for package in snapshot.PACKAGES:
        (elsewhere / package).mkdir(parents=True)
        (elsewhere / package / "__init__.py").write_text("raise AssertionError('another package')")
    source = fake_training(
        tmp_path / "source",
        "import launch.job\n"
        "    found = [__file__, launch.job.__file__, os.getcwd(), args, os.environ['OMP_NUM_THREADS']]\n"
        f"    pathlib.Path({str(told)!r}).write_text(json.dumps(found))\n    return 0",
    )
    monkeypatch.setattr(snapshot, "_source_root", lambda: source)
    submitted()
    (source / "distil_tl/train.py").write_text("raise AssertionError('edited since')")
    (source / "launch/job.py").write_text("raise AssertionError('edited since')")

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
    assert (train, job) == (f"{code}/distil_tl/train.py", f"{code}/launch/job.py")
    assert (cwd, args, threads) == (str(tmp_path / "here"), [str(run_dir / "slurm/config.yaml")], "1")


# What runs before it, and with which Python


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (["false", "touch reached"], "launch: slurm.setup failed with exit status 1: false\n"),
        (["f() { (exit 5); }", "f", "touch reached"], "launch: slurm.setup failed with exit status 5: "),
        (["value=$(exit 7)", "touch reached"], "launch: slurm.setup failed with exit status 7: value=$(exit 7)\n"),
        (["source nowhere/activate"], "launch: slurm.setup failed with exit status 1: source nowhere/activate\n"),
        (["set +e", "false", "touch reached"], None),
        (["false || true", "if false; then true; fi", "for i in 1 2; do", "touch reached", "done"], None),
        (["trap 'touch reached' EXIT"], None),
    ],
)
def test_a_line_of_setup_that_fails_ends_the_job(tmp_path: Path, setup: list[str], said: str | None) -> None:
    lines = [*executor.setup_lines(SlurmConfig(setup=setup)), "false", "echo training", "exit 0"]
    ran = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == ((0, "training\n") if said is None else (2, ""))
    assert (said or "") in ran.stderr
    assert ran.stderr.count("launch: ") == (said is not None)
    assert (tmp_path / "reached").exists() is (said is None)


def test_the_python_of_the_job(slurm: FakeSlurm, capsys) -> None:
    submitted("--dry-run", "slurm.python=python", "slurm.setup=[source /shared/venv/bin/activate]")
    script = capsys.readouterr().out
    assert re.search(r'^srun .* "\$\{BLOCK_SIGNALS\[@\]\}" python -u -m submitit', script, re.MULTILINE)
    submitted("--dry-run")
    assert f'"${{BLOCK_SIGNALS[@]}}" {sys.executable} -u -m submitit' in capsys.readouterr().out
    assert list(SlurmConfig(python=" ").problems()) == [
        "slurm.python is empty; use for example /shared/venv/bin/python, or null for the one used here"
    ]


# Errors of sbatch


def test_an_error_of_sbatch_is_printed_and_nothing_is_recorded(slurm: FakeSlurm, capsys) -> None:
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
def test_a_job_submitted_from_within_a_job_inherits_nothing_from_it(
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


def test_a_submission_removes_the_summary_of_the_last_attempt(slurm: FakeSlurm) -> None:
    run_dir = Path("runs/flowers")
    run_dir.mkdir(parents=True)
    (run_dir / "summary.json").write_text('{"status": "failed"}')
    submitted()
    assert not (run_dir / "summary.json").exists()
