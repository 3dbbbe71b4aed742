"""A rank is killed or frozen while another is blocked in a call that holds Python's lock: all end, and name it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import lost_ranks
from distil_tl.utils.command import run_command
from tests.helpers import ranks
from tests.helpers.paths import ROOT
from tests.helpers.torchrun import ENVIRONMENT


def test_a_killed_rank_under_torchrun() -> None:
    """torchrun sends TERM to the others, and would kill the blocked one after 30 s."""
    command = [sys.executable, "-m", "benchmarks.lost_ranks", "--fault=kill", "--repeats=1"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 0: status 1, rank 1: status 1, rank 2: status 137; rank 2 named by ranks [0, 1]" in done.stdout


def one_rank(folder: Path, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(run_command("lost_ranks", lambda: lost_ranks.rank(folder, "stop", 2.0)))


def test_a_frozen_rank(tmp_path: Path) -> None:
    """Nobody else notices it."""
    context, port = ranks.forkserver(), ranks.free_port()
    processes = [context.Process(target=one_rank, args=(tmp_path, rank, port)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        lost_ranks.wait_until(tmp_path, lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
        (tmp_path / "go").touch()
        for process in processes:
            process.join(lost_ranks.PATIENCE)
        assert [process.exitcode for process in processes] == [1, 1, 1]
    finally:
        for process in processes:
            process.kill()
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text()
        assert f"rank 2 (host {os.uname().nodename}, pid {processes[2].pid}) has been stopped (SIGSTOP) for " in said
