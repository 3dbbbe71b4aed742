"""Checks before a submission: what can not work, and run directories in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from distil_tl.models import weight_sources
from distil_tl.rundir.lock import Attempt
from launch import submit
from launch.records import read_record, write_record
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.submissions import PLAIN, refusal, submitted


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
def test_what_can_not_work_is_refused(slurm: FakeSlurm, capsys, args: list[str], message: str) -> None:
    if "cuda" in message.lower() and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in refusal(capsys, *args)
    assert not list(Path().iterdir())


def test_an_unknown_cluster_is_a_usage_error(slurm: FakeSlurm) -> None:
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
    monkeypatch.setattr(weight_sources, "missing_weights", lambda config: "https://weights")
    message = refusal(capsys)
    assert "the weights of shufflenet_v2_x0_5 (https://weights) are not on this machine" in message
    assert "distil-tl prefetch" in message
    submitted("slurm.nodes_download=true", "run_dir=runs/other")


def test_without_submitit_the_message_names_the_package(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "launch needs submitit: pip install 'distil_tl[slurm]'" in refusal(capsys)
    assert not list(Path().iterdir())


# Run directories in use


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_a_waiting_or_running_job_blocks_a_submission(slurm: FakeSlurm, capsys, state: str) -> None:
    submitted()
    slurm.change("7", state)
    assert (
        f"job 7 ({state}) is using {Path('runs/flowers').absolute()}; wait until it ends, run `scancel 7`"
        in refusal(capsys)
    )
    assert len(slurm.calls("sbatch")) == 1
    submitted("run_dir=runs/other")


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", None])
def test_an_ended_job_does_not_block_a_submission(slurm: FakeSlurm, state: str | None) -> None:
    submitted()
    if state is None:
        slurm.forget("7")
    else:
        slurm.change("7", state)
    submitted()
    assert (read_record(Path("runs/flowers")) or {})["job_id"] == "8"


def test_a_job_of_a_batch_script_is_found_by_its_attempt(slurm: FakeSlurm, capsys) -> None:
    Path("runs/flowers").mkdir(parents=True)
    Attempt(Path("runs/flowers")).begin(0, {"SLURM_JOB_ID": "9"})
    attempt = json.loads(Path("runs/flowers/attempt.json").read_text())
    Path("runs/flowers/attempt.json").write_text(json.dumps({**attempt, "process": "of a node"}))
    slurm.add("5_2", "RUNNING", own="9", nodes="n1")
    assert "job 5_2 (RUNNING) is using" in refusal(capsys)
    slurm.forget("5_2")
    submitted()


def test_a_process_of_this_machine_blocks_a_submission(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    Path("runs/flowers").mkdir(parents=True)
    Attempt(Path("runs/flowers")).begin(0, {})
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert "is in use: process" in refusal(capsys)


def test_a_local_job_blocks_a_submission_before_it_trains(slurm: FakeSlurm, capsys) -> None:
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


def test_a_run_that_cannot_be_checked_gets_no_second_job(slurm: FakeSlurm, capsys) -> None:
    submitted()
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    message = refusal(capsys)
    assert "can't be checked: Slurm does not answer (squeue: slurm_load_jobs error: Unable to contact" in message
    assert "add --assume-ended" in message
    assert len(slurm.calls("sbatch")) == 1
    submitted("--assume-ended")
    assert len(slurm.calls("sbatch")) == 2
