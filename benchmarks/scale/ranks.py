"""The ranks of a job as processes with torchrun's environment variables, and the result of each rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, environment


def run_ranks(
    world: int,
    module: str,
    task: dict[str, Any],
    work: Path,
    *,
    timeout: float = 900,
    prefixes: Sequence[Sequence[str]] | None = None,
    address: str = "127.0.0.1",
    **env: str,
) -> list[dict[str, Any]]:
    """Run `python -m MODULE TASK.json RESULT.json` on each rank, and return the results by rank.

    `prefixes`, one per rank, come before its command, for example to run it in a network namespace. Each rank is then
    the only one of its node.

    Raises:
        RuntimeError: a rank failed, or they took longer than `timeout` seconds. The message has its last output.
    """
    spec = work / "task.json"
    spec.write_text(json.dumps(task))
    port = str(_free_port())
    processes, logs = [], []
    try:
        for rank in range(world):
            result, log = work / f"result-{rank}.json", work / f"rank-{rank}.log"
            result.unlink(missing_ok=True)
            local = 0 if prefixes else rank
            variables = environment(
                RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local),
                LOCAL_WORLD_SIZE="1" if prefixes else str(world), MASTER_ADDR=address, MASTER_PORT=port, **env,
            )  # fmt: skip
            command = [*(prefixes[rank] if prefixes else ()), sys.executable, "-m", module, str(spec), str(result)]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                    start_new_session=True,
                )  # fmt: skip
            processes.append(process)
            logs.append(log)
        _wait(processes, logs, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [json.loads((work / f"result-{rank}.json").read_text()) for rank in range(world)]


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"the ranks took too long; the last output of rank 0:\n{_tail(logs[0])}")
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll() not in (None, 0):
            raise RuntimeError(
                f"rank {rank} failed with status {process.poll()}; its last output:\n{_tail(logs[rank])}"
            )


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
