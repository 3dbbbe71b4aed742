"""Slurm's daemons and munged: started on their machines, and waited for until they are ready."""

from __future__ import annotations

import functools
import shlex
import signal
import time
from collections.abc import Callable

from dev_cluster.config import HEAD, Cluster, FailedError
from dev_cluster.namespaces import entered, kill, running
from dev_cluster.processes import execute

TIMEOUT = 110  # seconds from the start of `up` until all nodes must be idle
HEAD_DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld")
STOPPABLE = {"controller": "slurmctld", "accounting": "slurmdbd", "munge": "munged", "node": "slurmd"}


def slurm(cluster: Cluster, *command: str, timeout: float = 20) -> str:
    """The standard output of one of Slurm's commands, run on the host."""
    return execute(["env", f"SLURM_CONF={cluster.slurm_conf}", *command], timeout)


def works(cluster: Cluster, *command: str) -> bool:
    try:
        slurm(cluster, *command)
    except FailedError:
        return False
    return True


def start(cluster: Cluster, holder: int, name: str, *command: object) -> None:
    """Start a daemon on the holder's machine. It may go to the background by itself or not."""
    log = cluster.log(name)
    quoted = shlex.join(map(str, command))
    prefix = f"exec env SLURM_CONF={cluster.slurm_conf} MYSQL_UNIX_PORT={cluster.dir}/db/socket"
    execute([*entered(holder), "setsid", "--fork", "sh", "-c", f"{prefix} {quoted} >>{log} 2>&1"])


def wait_for(cluster: Cluster, holder: int, name: str, ready: Callable[[], bool], deadline: float) -> None:
    """Raises FailedError, with the daemon's log, when it is not ready in time or has died."""
    daemon = name.partition("-")[0]
    began = time.monotonic()
    while not ready():
        now = time.monotonic()
        died = now > began + 3 and daemon not in running(holder).values()
        if died or now > deadline:
            logs = [name, "slurmctld"] if daemon == "slurmd" else [name]
            reason = "died" if died else f"was not ready within {TIMEOUT} s"
            raise FailedError(f"{name} {reason}", *map(cluster.log, logs))
        time.sleep(0.1)


def start_munged(cluster: Cluster, head: int) -> None:
    directory = cluster.dir
    start(
        cluster, head, "munged", "munged", "--foreground", "--num-threads=10", f"--socket={directory}/munge/socket",
        f"--key-file={directory}/key/munge.key", f"--pid-file={directory}/run/munged.pid",
        f"--seed-file={directory}/key/seed",
        "--force",  # otherwise every parent directory of the socket must be accessible to all users
    )  # fmt: skip


def wait_for_munged(cluster: Cluster, head: int, deadline: float) -> None:
    wait_for(cluster, head, "munged", (cluster.dir / "munge/socket").is_socket, deadline)


def start_slurmctld(cluster: Cluster, head: int, deadline: float) -> None:
    start(cluster, head, "slurmctld", "slurmctld")
    wait_for(cluster, head, "slurmctld", lambda: works(cluster, "sinfo"), deadline)


def start_nodes(cluster: Cluster, machines: dict[str, int], deadline: float) -> None:
    """Start slurmd on all nodes, and wait until all are idle."""
    for node in cluster.node_names:
        start_slurmd(cluster, machines[node], node)
    for node in cluster.node_names:
        wait_for(cluster, machines[node], f"slurmd-{node}", functools.partial(is_idle, cluster, node), deadline)


def node_states(cluster: Cluster) -> dict[str, str]:
    """Slurm's state of each node, in its short form."""
    lines = slurm(cluster, "sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t").splitlines()
    return dict(line.split() for line in lines)


def is_idle(cluster: Cluster, node: str) -> bool:
    return node_states(cluster).get(node) == "idle"


def start_slurmd(cluster: Cluster, holder: int, node: str) -> None:
    start(cluster, holder, f"slurmd-{node}", "slurmd")


def slurmds(holder: int) -> list[int]:
    """The process ids of slurmd on a node."""
    return [pid for pid, name in running(holder).items() if name == "slurmd"]


def kill_slurmd(holder: int) -> None:
    for pid in slurmds(holder):
        kill(pid, lambda pid: pid in slurmds(holder))


def stop(holder: int, name: str) -> None:
    """End a daemon of a machine as its service would be stopped, and wait until it has ended."""
    deadline = time.monotonic() + TIMEOUT
    while pids := [pid for pid, command in running(holder).items() if command == name]:
        for pid in pids:
            kill(pid, lambda pid: running(holder).get(pid) == name, signal.SIGTERM)
        if time.monotonic() > deadline:
            raise FailedError(f"{name} did not end within {TIMEOUT} s")
        time.sleep(0.2)


def missing_daemons(machine: str, commands: set[str]) -> list[str]:
    """The daemons that are not among the commands that run on the machine."""
    daemons = HEAD_DAEMONS if machine == HEAD else ("slurmd",)
    return [name for name in daemons if name not in commands]
