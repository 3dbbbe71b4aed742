"""The watchdog of this rank: start it, tell it how this rank leaves, ask it which rank is lost."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distil_tl.distributed.watchdog.connection import FAILED, ORDERLY
from distil_tl.distributed.watchdog.forced_exit import arm

CLOSE = 5.0  # seconds for the process to exit
CONNECT = 5.0  # seconds in which that of rank 0 must be reached
TIMES = {  # seconds
    "grace": 7.0,  # in which a rank may notice by itself that another one is lost
    "forced_exit": 3.0,  # after which a rank that is told to exit is killed
    "doubt": 1.0,  # in which another rank's death may turn out to be the reason for a rank's error
    "greeting": 20.0,  # in which a connection has to say who it is
    "suspended": 10.0,  # from which on the rank is told that its job was suspended; less is a busy machine
}
_MASKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
# The package is found last, so that nothing beside it can hide a module of the standard library.
_CODE = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from distil_tl.distributed.watchdog.process import main; main(int(sys.argv[2]))"
)


def open_hub(everywhere: bool) -> tuple[socket.socket, dict[str, Any]]:
    """On rank 0: a socket to which the other watchdogs connect, and its address, for them.

    Args:
        everywhere: reachable from other machines.
    """
    if everywhere and socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=1024)
    return listener, {"port": listener.getsockname()[1], "token": secrets.token_hex(16), "hub_pid": os.getpid()}


def connect_to_hub(hosts: Sequence[str], port: int) -> socket.socket:
    """A connection to the watchdog of rank 0, at the first of its host names that answers.

    Raises:
        OSError: it can't be reached.
    """
    for host in hosts[:-1]:
        with suppress(OSError):
            return socket.create_connection((host, port), timeout=CONNECT)
    return socket.create_connection((hosts[-1], port), timeout=CONNECT)


class RankWatchdog:
    """The connection of this rank to its watchdog. Without a process, which can't be started everywhere, it is silent.

    Attributes:
        process: None before `start`.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._ours, self._theirs = socket.socketpair()
        self._received = b""
        self._lost: str | None = None
        self._suspensions: list[tuple[float, float]] = []  # when they ended, in monotonic time, and their seconds
        self._has_peers = self._connected = self._rank_zero_ended = False

    def start(self, settings: dict[str, Any], connection: socket.socket | None) -> None:
        """Start the process.

        Args:
            settings: as `process.Watchdog` describes them, without the descriptors, this process's id and TIMES.
            connection: from `open_hub` or `connect_to_hub`. It is closed here, as the process has its own copy.

        Raises:
            OSError: it can't be started.
        """
        descriptors = {"exit_pipe": arm(), "socket": None if connection is None else connection.fileno()}
        self._say({"pid": os.getpid(), **TIMES, **settings, **descriptors})
        passed = [self._theirs.fileno(), *(file for file in descriptors.values() if file is not None)]
        root = str(Path(__file__).parents[3])
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _CODE,
            root,
            str(passed[0]),
            f"watchdog of rank {settings['rank']}",
        ]
        # The new process inherits blocked signals: none may end it before it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _MASKED)
        try:
            self.process = subprocess.Popen(
                command, pass_fds=passed, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/"
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._theirs.close()
            if connection is not None:
                connection.close()
        self._has_peers = connection is not None

    def leave(self, *, orderly: bool, seconds: float | None) -> None:
        """Say that this rank is about to exit, so that its watchdog lets it end by itself.

        Args:
            orderly: the other ranks need not end because of it.
            seconds: time that it may take; then the watchdog ends the rank. None: no limit.
        """
        self._say({"leaving": ORDERLY if orderly else FAILED, "seconds": seconds})

    def log_to(self, path: Path) -> None:
        """Write the message of a forced end to this file too."""
        self._say({"log": str(path.absolute())})

    def lost(self, wait: float = 0.0) -> str | None:
        """Which rank is lost, and how, in words; None if there is none. Waits up to `wait` seconds for the answer."""
        self._hear(wait, lambda: self._lost is not None)
        return self._lost

    def suspended(self, within: float, wait: float = 0.0) -> float:
        """For how many seconds the whole job was suspended; 0 if it was not, or no longer in the last `within` seconds.

        Waits up to `wait` seconds for the answer, or until a rank is lost.
        """

        def found() -> list[float]:
            return [seconds for until, seconds in self._suspensions if time.monotonic() - until <= within]

        self._hear(wait, lambda: bool(found()) or self._lost is not None)
        return max(found(), default=0.0)

    def is_connected(self, wait: float) -> bool:
        """Whether this watchdog, not that of rank 0, is connected to that of rank 0. Waits up to `wait` seconds."""
        self._hear(wait, lambda: self._connected)
        return self._connected

    def wait_for_end_of_rank_zero(self, seconds: float) -> None:
        """Wait until the process of rank 0 has exited, or its watchdog is closed; not if that is not known."""
        if self._has_peers:
            self._hear(seconds, lambda: self._rank_zero_ended)

    def close(self) -> None:
        """End the watchdog, after `leave`."""
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._ours.close()
        if self.process is None:
            return
        try:
            self.process.wait(CLOSE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _say(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the watchdog has ended
            self._ours.settimeout(1.0)
            self._ours.sendall(json.dumps(message).encode() + b"\n")

    def _hear(self, seconds: float, done: Callable[[], bool]) -> None:
        """Read what the watchdog says, until `done` or for `seconds`."""
        deadline = time.monotonic() + seconds
        while self.process is not None and not done():
            try:
                self._ours.settimeout(max(0.0, deadline - time.monotonic()))
                received = self._ours.recv(1 << 16)
            except OSError:  # nothing in that time
                return
            if not received:  # the watchdog has ended
                return
            *lines, self._received = (self._received + received).split(b"\n")
            for message in map(json.loads, lines):
                self._lost = message.get("verdict", self._lost)
                self._connected = message.get("connected", self._connected)
                if "suspended" in message:
                    self._suspensions.append((message["until"], message["suspended"]))
                self._rank_zero_ended = message.get("rank_zero_ended", self._rank_zero_ended)
