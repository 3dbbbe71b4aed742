"""Two network namespaces and a link of limited bandwidth between them, made here and gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.231.77.1", "10.231.77.2")  # known inside the two namespaces only


@dataclass(frozen=True)
class Link:
    prefixes: tuple[list[str], list[str]]  # before a command, to run it on one of the two sides
    address: str  # of the first side
    interface: str  # the name of the link's end, the same on both sides


def missing() -> str | None:
    """Why there can be no link here; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if absent:
        return f"there is no {' and no '.join(absent)} (Debian: apt-get install iproute2)"
    try:
        with link(None):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"namespaces can't be made here: {getattr(error, 'stderr', None) or error}".strip()


@contextmanager
def link(mbit: int | None) -> Iterator[Link]:
    """A link of `mbit` megabits a second each way, by a token bucket; None for as fast as the machine is."""
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
                # A burst of 10 ms, and no more than 200 ms of waiting in line.
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
