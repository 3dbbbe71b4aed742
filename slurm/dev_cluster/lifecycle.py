"""Bringing a cluster up, and taking it down."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from dev_cluster.accounting import start_database, start_slurmdbd
from dev_cluster.config import FILE, GPUS, HEAD, Cluster, FailedError, RefusedError, message
from dev_cluster.config_files import write_files
from dev_cluster.daemons import TIMEOUT, start_munged, start_nodes, start_slurmctld, wait_for_munged
from dev_cluster.namespaces import NAMESPACES, end_machine, holders, start_machines
from dev_cluster.network import connect, free_subnet, link_name
from dev_cluster.processes import PATH, execute

PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # those that end the command


def check_machine() -> None:
    """Raises RefusedError if this machine cannot run a cluster."""
    missing = sorted({package for command, package in PACKAGES.items() if shutil.which(command, path=PATH) is None})
    if missing:
        names = " ".join(missing)
        raise RefusedError(
            f"not installed: {', '.join(missing)}. To install what is missing:\n"
            f"    apt-get install --no-install-recommends {names}"
        )
    try:
        trial = "mount -t proc proc /proc && ip link add br0 type bridge && ip link add eth0 type veth peer name eth1"
        execute(["unshare", *NAMESPACES, "sh", "-c", trial])
    except FailedError as error:
        raise RefusedError(
            f"this kernel, or the container that this command runs in, does not allow namespaces with network links: "
            f"{error}"
        ) from None


def check_options(directory: Path, name: str, nodes: int, cpus: int, memory: int) -> None:
    """Raises RefusedError, with the allowed values, for the first option that is wrong."""
    if not re.fullmatch(r"[\w./+-]{1,80}", str(directory), re.ASCII):
        raise RefusedError(f"--dir {directory}: at most 80 letters, digits and ./+-_, for Slurm's files and sockets")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
        raise RefusedError(f"--name {name}: only lower-case letters, digits and _, a letter first")
    for option, value, most in (("nodes", nodes, 200), ("cpus", cpus, 1024), ("memory", memory, 10**8)):
        if not 1 <= value <= most:
            raise RefusedError(f"--{option} {value}: 1 to {most}")


def bring_up(directory: Path, name: str, nodes: int, cpus: int, memory: int) -> Cluster:
    """Bring up a cluster with all nodes idle. If that fails, nothing of it remains.

    Raises:
        RefusedError: the options are wrong, the directory exists, or this machine cannot run a cluster.
        FailedError: a daemon died or was not ready in time.
    """
    check_machine()
    check_options(directory, name, nodes, cpus, memory)
    if holders(directory) or os.path.lexists(directory):
        raise RefusedError(f"{directory} exists already; to take a cluster down: {sys.argv[0]} down --dir {directory}")
    cluster = Cluster(directory, name, nodes, cpus, memory, free_subnet(directory))
    try:
        directory.mkdir()
        directory.chmod(0o755)
    except OSError as error:
        raise RefusedError(f"--dir {directory}: {error.strerror}") from None
    with locked(directory):
        try:
            start_all(cluster)
        except BaseException:
            ignore_signals()
            message(f"taking {directory} down again")
            take_down(directory)
            raise
    return cluster


def start_all(cluster: Cluster) -> None:
    began = time.monotonic()
    deadline = began + TIMEOUT
    cluster.write()
    write_files(cluster)
    machines = start_machines(cluster)
    connect(cluster, machines)
    head = machines[HEAD]
    start_munged(cluster, head)
    start_database(cluster, head, deadline)
    wait_for_munged(cluster, head, deadline)
    start_slurmdbd(cluster, head, deadline)
    start_slurmctld(cluster, head, deadline)
    start_nodes(cluster, machines, deadline)
    message(
        f"{cluster.nodes} nodes ({', '.join(cluster.node_names)}) with {cluster.cpus} CPUs and {GPUS} claimed GPUs "
        f"each are idle after {time.monotonic() - began:.0f} s. Partitions: batch, grace, urgent."
    )


def take_down(directory: Path) -> bool:
    """End everything of a cluster and remove its directory; whether there was anything.

    Nothing is read from the directory, because the cluster may be half made.
    """
    existed = False
    deadline = time.monotonic() + 20
    while machines := holders(directory):
        existed = True
        if time.monotonic() > deadline:
            raise FailedError(f"these machines of {directory} cannot be ended: {machines}")
        for machine, holder in machines.items():
            end_machine(directory, machine, holder)
        time.sleep(0.05)
    link = link_name(directory)
    if Path("/sys/class/net", link).exists():
        with contextlib.suppress(FailedError):  # the kernel may have removed it in the meantime
            execute(["ip", "link", "delete", link])
    if os.path.lexists(directory):
        existed = True
        shutil.rmtree(directory)
    return existed


def take_down_checked(directory: Path) -> bool:
    """`take_down`, but raises RefusedError for a directory that is not a cluster's."""
    with locked(directory):
        if directory.is_dir() and any(directory.iterdir()) and not (directory / FILE).exists():
            raise RefusedError(f"{directory} is not the directory of a cluster; nothing was changed")
        return take_down(directory)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One command at a time brings up or takes down in `directory`. The lock is on the directory: no file remains."""
    handle = lock(directory)
    while handle is not None and not is_same(directory, handle):  # it was removed while this command waited
        os.close(handle)
        handle = lock(directory)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def lock(directory: Path) -> int | None:
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RefusedError(f"--dir {directory}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message(f"waiting for another dev-cluster command in {directory}")
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def is_same(directory: Path, handle: int) -> bool:
    """Whether the open directory is still the one with this path."""
    try:
        return os.path.samestat(os.fstat(handle), directory.stat())
    except FileNotFoundError:
        return False


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_raise_exit() -> Iterator[None]:
    """The first Ctrl-C, TERM or HUP raises SystemExit. Later ones are ignored, so that cleaning up can finish."""

    def leave(number: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
