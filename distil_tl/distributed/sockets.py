"""The connections of torch's process group, which torch does not show."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def open_sockets() -> dict[int, str]:
    """The identity of each open socket of this process, by descriptor; empty where /proc is missing."""
    found = {}
    with suppress(OSError):
        for path in list(Path("/proc/self/fd").iterdir()):
            with suppress(OSError):  # closed meanwhile
                target = os.readlink(path)  # noqa: PTH115 - not a path of a file
                if target.startswith("socket:"):
                    found[int(path.name)] = target
    return found


def new_connections(before: Mapping[int, str], except_port: int) -> dict[int, str]:
    """The connections that were opened since `before`, but for those to the store, which listens at a port."""
    found = {}
    for number, identity in open_sockets().items():
        ports = _ports(number)
        if before.get(number) != identity and ports and except_port not in ports:
            found[number] = identity
    return found


def _ports(number: int) -> tuple[int, ...]:
    """The ports at both ends of a connection; nothing for a socket that is not connected to another machine."""
    try:
        with socket.socket(fileno=os.dup(number)) as duplicate:
            return int(duplicate.getsockname()[1]), int(duplicate.getpeername()[1])
    except (OSError, IndexError, TypeError, ValueError):
        return ()


def shut_down(sockets: Mapping[int, str]) -> None:
    """End the connections of `sockets` that are still open. Their owners, here and at the other end, get an error."""
    for number, identity in open_sockets().items():
        if sockets.get(number) == identity:
            with suppress(OSError), socket.socket(fileno=os.dup(number)) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)
