"""How many connections this process may have, and those of torch's process group, which torch does not show."""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)  # below that of the package

OTHER_FILES = 512  # of a rank: libraries, data, logs, loader processes


def allow_connections(ranks: int) -> None:
    """Raise this process's limit of open files if it is too low for that many ranks, as far as that is possible.

    Each rank has a connection to each other one, and rank 0 may have another one to each as it serves the store. The
    usual limit of 1024 is too low for 1,000 ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OTHER_FILES + 2 * ranks
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    if soft < needed:
        logger.warning(
            "this process may open %d files and connections, and %d ranks may need %d; raise the limit with ulimit -n",
            soft, ranks, needed,
        )  # fmt: skip


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
