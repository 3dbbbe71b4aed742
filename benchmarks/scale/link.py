"""Two temporary network namespaces with a link of limited bandwidth between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
                # A burst of 10 ms, and a queue of at most 200 ms.
                burst = max(32_000, mbit * 1_000_000 // 8 // 100)
                limit = [f"{mbit}mbit", "burst", str(burst), "latency", "200ms"]
                _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "wire", "root", "tbf", "rate", *limit)
        first, second = ([*("ip", "netns", "exec"), name] for name in names)
        yield Link((first, second), ADDRESSES[0], "wire")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*args: str) -> None:
    _run("ip", *args)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
