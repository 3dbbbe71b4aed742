"""launch.agent: signals go to the workers of torchrun, and torchrun does not start them again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.slurm_jobs import wait_until

# As torchrun: it starts a worker again when it has failed, and dies of a signal if it can.
TORCHRUN = """
import subprocess, sys
while subprocess.call([sys.executable, "-S", "worker.py"]):
    pass
"""
AGENT = """
import sys
from launch import agent
agent.TORCHRUN = [sys.executable, "-S", "torchrun.py"]
sys.exit(agent.main([]))
"""
WORKER = """
import os, pathlib, signal, sys
starts = pathlib.Path("starts")
starts.open("a").write("start\\n")
if os.environ.get("REFUSES"):
    pathlib.Path(os.environ["DISTIL_TL_OUTCOME"]).write_text("refused\\n")
    sys.exit(2)
got = signal.sigwait([signal.SIGTERM, signal.SIGUSR2])
pathlib.Path("got").write_text(signal.Signals(got).name)
sys.exit(3)
"""


def agent(folder: Path, torchrun: str = TORCHRUN, worker: str = WORKER, **environ: str) -> subprocess.Popen[str]:
    (folder / "torchrun.py").write_text(torchrun)
    (folder / "worker.py").write_text(worker)
    return subprocess.Popen(
        [sys.executable, "-c", AGENT], cwd=folder, text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DISTIL_TL_OUTCOME": str(folder / "outcome"), **environ},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_a_worker_that_is_not_started_again(tmp_path: Path, number: signal.Signals) -> None:
    process = agent(tmp_path)
    wait_until((tmp_path / "starts").exists)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, (tmp_path / "got").read_text()) == (3, number.name), error
    assert not (tmp_path / "outcome").exists(), "rank 0 says that the run was preempted"


def test_a_signal_before_there_are_workers(tmp_path: Path) -> None:
    process = agent(tmp_path, "import time; time.sleep(1000)")
    wait_until(lambda: "torchrun.py" in subprocess.getoutput(f"ps --ppid {process.pid} -o args="))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (3, "launch: stopped by SIGTERM before training started\n")
    assert (tmp_path / "outcome").read_text() == "preempted\n"


def test_workers_that_refuse_their_input_are_not_started_again_and_again(tmp_path: Path) -> None:
    worker = WORKER.replace("sys.exit(2)", "import time; time.sleep(1); sys.exit(2)")
    process = agent(tmp_path, worker=worker, REFUSES="1")
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert (tmp_path / "starts").read_text().count("start") <= 2


@pytest.mark.parametrize(("ends", "status"), [("sys.exit(0)", 0), ("sys.exit(5)", 5), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_of_torchrun(tmp_path: Path, ends: str, status: int) -> None:
    process = agent(tmp_path, f"import os, sys; {ends}")
    process.communicate(timeout=60)
    assert process.returncode == status
