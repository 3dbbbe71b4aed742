"""Real ranks for tests: gloo processes, forked from a server that has already imported torch."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOAD = ["tests.helpers.warm"]


@functools.cache
def forkserver() -> ForkServerContext:
    """The server, with everything imported: the time that this takes on a busy machine is not part of any timeout."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    first = context.Process(target=rank)
    first.start()
    first.join()
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run_ranks(world: int, body: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Results by rank of `body(*args)` in `world` processes with torchrun's environment.

    All are killed after `timeout` seconds.

    Raises:
        AssertionError: a rank failed (with its traceback), died, or did not end in time.
    """
    context = forkserver()
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(results, rank, world, port, body, args), daemon=False)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < world:
            try:
                rank, ok, value = results.get(timeout=0.5)
            except queue.Empty:
                assert time.monotonic() < deadline, f"only ranks {sorted(found)} of {world} ended in {timeout} s"
                dead = [i for i, p in enumerate(ranks) if p.exitcode not in (None, 0) and i not in found]
                assert not dead, f"ranks {dead} died"
                continue
            assert ok, f"rank {rank} failed:\n{value}"
            found[rank] = value
    finally:
        for process in ranks:
            if len(found) < world:
                process.kill()
            process.join(30)
    return [found[rank] for rank in range(world)]


def _rank(results: Any, rank: int, world: int, port: int, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as in a process that a user starts
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    try:
        results.put((rank, True, body(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        sys.stdout.flush()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def train(args: list[str]) -> int:
    """`python -m distil_tl.train` in this process; its exit status."""
    from distil_tl.train import main

    return main(args)


def lines(run_dir: Path, **having: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl whose fields are as given."""
    import json

    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if all(line[key] == value for key, value in having.items())]


def processes_of(folder: Path) -> list[int]:
    """Ids of processes whose command line names a folder, loader workers included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
