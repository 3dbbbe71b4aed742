"""Temporary network namespaces: two with a link of limited bandwidth, or many nodes behind a switch."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.scale import delay

ADDRESSES = ("10.231.77.1", "10.231.77.2")  # exist inside the two namespaces only


@dataclass(frozen=True)
class Link:
    prefixes: tuple[list[str], list[str]]  # to put before a command to run it in the first or second namespace
    address: str  # of the first namespace
    interface: str  # the network interface, with the same name in both namespaces


def missing() -> str | None:
    """The reason why a link can't be made on this machine, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if absent:
        return f"{' and '.join(absent)} not found (Debian: apt-get install iproute2)"
    try:
        with link(None):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"can't create network namespaces: {getattr(error, 'stderr', None) or error}".strip()


@dataclass(frozen=True)
class Cluster:
    namespaces: tuple[str, ...]  # one per node
    address: str  # of the first node
    interface: str  # the network interface, with the same name on all nodes


FIRST = "10.231.76.1"  # address of the first node of a cluster


@contextmanager
def cluster(nodes: int, delay_ms: float | None = None, mbit: int | None = None) -> Iterator[Cluster]:
    """Nodes behind one switch. `mbit` limits what each node sends; `delay_ms` is one way from node to node.

    Without a delay the switch is the kernel's. With one it is a process, which is slow: for small messages.
    """
    names = [f"distil-tl-{os.getpid()}-{node}" for node in range(nodes)]
    switch = f"distil-tl-{os.getpid()}-switch"
    delaying: int | None = None
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "name", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        ends = []
        for node, name in enumerate(names):
            _ip("netns", "add", name)
            if delay_ms is None:
                _ip("link", "add", "name", "wire", "netns", name, "type", "veth", "peer", "name", f"port{node}",
                    "netns", switch)  # fmt: skip
                _ip("-n", switch, "link", "set", f"port{node}", "master", "switch", "up")
            else:
                tun = f"dtl{os.getpid() % 10**6}-{node}"
                ends.append(delay.tunnel(tun))
                _ip("link", "set", tun, "netns", name, "name", "wire")
            address = ipaddress.IPv4Address(FIRST) + node
            _ip("-n", name, "address", "add", f"{address}/20", "dev", "wire")
            for interface in ("wire", "lo"):
                _ip("-n", name, "link", "set", interface, "up")
            if mbit is not None:
                _limit(name, mbit)
        if ends and delay_ms is not None:
            delaying = os.fork()
            if delaying == 0:
                try:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    delay.forward(ends, ipaddress.IPv4Address(FIRST).packed, delay_ms / 1000)
                finally:
                    os._exit(1)
        for end in ends:
            os.close(end)
        yield Cluster(tuple(names), FIRST, "wire")
    finally:
        if delaying:
            os.kill(delaying, signal.SIGKILL)
            os.waitpid(delaying, 0)
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def link(mbit: int | None) -> Iterator[Link]:
    """A link of `mbit` megabits per second in each direction, limited by a token bucket filter; None: no limit."""
    names = [f"distil-tl-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "name", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "wire")
            _ip("-n", name, "link", "set", "wire", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            if mbit is not None:
                _limit(name, mbit)
        first, second = ([*("ip", "netns", "exec"), name] for name in names)
        yield Link((first, second), ADDRESSES[0], "wire")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _limit(namespace: str, mbit: int) -> None:
    """Limit what a namespace sends, by a token bucket filter with a burst of 10 ms and a queue of at most 200 ms."""
    burst = max(32_000, mbit * 1_000_000 // 8 // 100)
    limit = [f"{mbit}mbit", "burst", str(burst), "latency", "200ms"]
    _ip("netns", "exec", namespace, "tc", "qdisc", "add", "dev", "wire", "root", "tbf", "rate", *limit)


def _ip(*args: str) -> None:
    _run("ip", *args)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
