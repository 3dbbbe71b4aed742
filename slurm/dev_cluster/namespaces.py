"""The machines of a cluster: sets of namespaces, each kept by one holder process.

No process id is stored. A holder is recognised by its command line, and any other process by its namespace. So an id
that the kernel has given to another process in the meantime is never taken for one of the cluster.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from dev_cluster.config import HEAD, Cluster, FailedError, RefusedError
from dev_cluster.processes import PATH

NAMESPACES = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--propagation=slave")


def holder_command(directory: Path, machine: str) -> list[str]:
    return ["unshare", *NAMESPACES, "bash", str(directory / "etc/machine"), machine]


def start_machines(cluster: Cluster) -> dict[str, int]:
    """Start the holders of the head and the nodes; the process id of each."""
    started = {}
    for machine in (HEAD, *cluster.node_names):
        with cluster.log(machine).open("wb") as log:
            started[machine] = subprocess.Popen(
                holder_command(cluster.dir, machine), env={"PATH": PATH}, cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
    for machine, process in started.items():
        assert process.stdout is not None
        with process.stdout as out:
            if out.readline() != b"ready\n":
                raise FailedError(f"{machine} could not be started", cluster.log(machine))
    return {machine: process.pid for machine, process in started.items()}


def process_ids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def machine_of(pid: int, directory: Path) -> str | None:
    """The machine of the cluster in `directory` whose holder the process is, or None."""
    try:
        if Path(f"/proc/{pid}").stat().st_uid != 0:
            return None
        argv = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    # Compare only the first and last words, so that clusters of older versions of this script are found, too.
    ours = argv[:1] == ["unshare"] and argv[-3:-1] == holder_command(directory, "")[-3:-1]
    return argv[-1] if ours else None


def holders(directory: Path) -> dict[str, int]:
    """The process ids of the holders that are alive, by machine."""
    machines = ((machine_of(pid, directory), pid) for pid in process_ids())
    return {machine: pid for machine, pid in machines if machine is not None}


def holder_of(cluster: Cluster, machine: str) -> int:
    """The process id of a machine's holder. Raises RefusedError if it is dead."""
    try:
        return holders(cluster.dir)[machine]
    except KeyError:
        raise RefusedError(f"{machine} of {cluster.dir} is dead; take the cluster down and bring it up again") from None


def namespace(pid: int, kind: str) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return None  # the process has ended, or is a zombie


def command_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def running(holder: int) -> dict[int, str]:
    """The processes of a machine: their ids and command names."""
    inside = namespace(holder, "pid_for_children")
    return {pid: command_name(pid) for pid in process_ids() if inside is not None and namespace(pid, "pid") == inside}


def entered(holder: int) -> list[str]:
    """The prefix of a command that is to run on the holder's machine."""
    # The holder itself is in the outer process namespace. Its child was the first process of the inner one.
    inner = f"--pid=/proc/{holder}/ns/pid_for_children"
    return ["nsenter", f"--target={holder}", "--net", "--mount", "--uts", inner]


def kill(pid: int, condition: Callable[[int], bool], number: int = signal.SIGKILL) -> None:
    """Send a signal if `condition(pid)` holds. It is checked when the id can no longer be reused."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            if condition(pid):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def end_machine(directory: Path, machine: str, holder: int) -> None:
    """Kill all processes in a machine's network namespace. The holder ends when all have ended."""
    network = namespace(holder, "net")
    if network is None or network == namespace(os.getpid(), "net"):  # it has not made its namespaces yet
        kill(holder, lambda pid: machine_of(pid, directory) == machine)
        return
    for pid in process_ids():
        if pid != holder and namespace(pid, "net") == network:
            kill(pid, lambda pid: namespace(pid, "net") == network)
