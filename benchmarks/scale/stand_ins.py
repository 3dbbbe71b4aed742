"""Up to some hundred stand-in ranks on one machine: `python -m benchmarks.scale.stand_ins TASK.json RESULT.json`.

They are forked from one parent that has imported torch, so that each needs little memory of its own. With root each
node is a network and a host name of its own, and the network between the nodes has a latency and a bandwidth.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import end_on_sigterm
from benchmarks.scale import stand_in
from benchmarks.scale.link import Cluster

DEFAULTS: dict[str, Any] = {
    "per_node": 8, "files": 100_000, "timeout": 600.0, "heartbeat": 60.0, "lost": False, "lazy": True,
    "patience": 500.0,
}  # fmt: skip
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


def main() -> None:
    end_on_sigterm()
    task = json.loads(Path(sys.argv[1]).read_text())
    made = None if task.get("cluster") is None else Cluster(**task.pop("cluster"))
    Path(sys.argv[2]).write_text(json.dumps(stand_ins(task, made)))


def stand_ins(task: dict[str, Any], made: Cluster | None = None) -> dict[str, Any]:
    """Start the ranks, wait for them, and return what they measured and how they ended.

    Args:
        task: `ranks`, and any of DEFAULTS. `lazy`: gloo connects two ranks when they first exchange something, not
            all at once.
        made: the nodes; None for the loopback interface alone.

    Raises:
        RuntimeError: a rank ended otherwise than it should, or they took longer than `patience` seconds.
    """
    task = {**DEFAULTS, **task}
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that the ranks do not write to, and so copy, the pages of what is imported
    with tempfile.TemporaryDirectory(prefix="distil-tl-stand-ins-") as folder:
        return _run(task, made, Path(folder))


def _run(task: dict[str, Any], made: Cluster | None, folder: Path) -> dict[str, Any]:
    task["interface"] = "lo" if made is None else made.interface
    task["killed_at"] = str(folder / "killed")
    address = "127.0.0.1" if made is None else made.address
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gate = os.pipe()  # no rank starts before all are forked
    running: dict[int, int] = {}
    ended: dict[int, tuple[int, float]] = {}  # by rank its status, and when
    try:
        for rank in range(task["ranks"]):
            pid = os.fork()
            if pid == 0:
                os.close(gate[1])
                os.read(gate[0], 1)
                os._exit(_child(task, rank, f"{address}:{port}", made, folder))
            running[pid] = rank
        began = time.monotonic()
        os.close(gate[1])
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                rank = running.pop(pid)
                ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
                _check(task, rank, ended[rank][0], folder)
            elif time.monotonic() > began + task["patience"]:
                raise RuntimeError(f"{len(running)} of {task['ranks']} ranks have not ended in {task['patience']} s")
            else:
                time.sleep(0.01)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    last = max(when for _, when in ended.values())
    found: dict[str, Any] = {"ranks": task["ranks"], "seconds": last - began}
    if task["lost"]:
        return {**found, "end_seconds": last - float(Path(task["killed_at"]).read_text())}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    return {**found, **summary(task, began, ended, folder)}


def _child(task: dict[str, Any], rank: int, address: str, made: Cluster | None, folder: Path) -> int:
    """What a forked process does. Returns its exit status."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        node, local = divmod(rank, task["per_node"])
        if made is not None:
            _enter(made.namespaces[node], f"node-{node}")
        host, port = address.split(":")
        here = min(task["per_node"], task["ranks"] - node * task["per_node"])
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(task["ranks"]), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(here),
            GROUP_RANK=str(node), MASTER_ADDR=host, MASTER_PORT=port, GLOO_SOCKET_IFNAME=task["interface"],
            TORCH_GLOO_LAZY_INIT=str(int(task["lazy"])),
        )  # fmt: skip
        if task["lost"]:
            return stand_in.be_lost(task)
        return stand_in.run(task, lambda found: _write(folder / f"found-{rank}.json", found))
    except BaseException:
        traceback.print_exc()
        return 1


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found))


def _enter(namespace: str, host: str) -> None:
    """Move this process into a network namespace, with a host name of its own."""
    library = ctypes.CDLL(None, use_errno=True)
    file = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if library.setns(file, _CLONE_NEWNET) != 0 or library.unshare(_CLONE_NEWUTS) != 0:
        raise OSError(ctypes.get_errno(), "can't enter a namespace")
    os.close(file)
    socket.sethostname(host)


def _check(task: dict[str, Any], rank: int, status: int, folder: Path) -> None:
    """All are preempted; or one is killed, and the others notice."""
    expected = {3}
    if task["lost"]:
        expected = {-signal.SIGKILL} if rank == task["ranks"] - 1 else {1}
    if status not in expected:
        output = (folder / f"output-{rank}").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"rank {rank} ended with status {status} in place of {expected}; its last output:\n{output}")


def summary(task: dict[str, Any], began: float, ended: dict[int, tuple[int, float]], folder: Path) -> dict[str, Any]:
    """The ranks' results, combined.

    Returns:
        parts: by name; seconds from the first rank's beginning to the last one's end, CPU seconds of rank 0, which
            serves the store, and of the others (median and largest), requests to the store by all ranks, and bytes
            that the node of rank 0 sent to the others.
    """
    ranks = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(task["ranks"])]
    parts = {}
    for name in ranks[0]["parts"]:
        each = [rank["parts"][name] for rank in ranks]
        others = sorted(part["cpu_seconds"] for part in each[1:])
        parts[name] = {
            "seconds": max(part["ended"] for part in each) - min(part["began"] for part in each),
            "cpu_rank_zero": each[0]["cpu_seconds"],
            "cpu_other": others[len(others) // 2],
            "requests": sum(part["requests"] for part in each),
            "sent": each[0]["sent"],
        }
    left = max(when for _, when in ended.values()) - max(rank["reported"] for rank in ranks)
    return {
        "parts": parts,
        "formed_seconds": max(rank["formed"] for rank in ranks) - began,
        "stop_seconds": max(rank["stop_seconds"] for rank in ranks),
        "leave_seconds": left,
        **{key: max(rank[key] for rank in ranks) for key in ("private_mb", "watchdog_mb", "descriptors")},
    }


if __name__ == "__main__":
    main()
