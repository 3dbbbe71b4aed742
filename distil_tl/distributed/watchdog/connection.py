"""Messages between watchdogs, and between a watchdog and its rank. Only the standard library."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

LONGEST = 1 << 16  # bytes that are received at once, and of the longest message
ORDERLY, FAILED = "orderly", "failed"  # how a rank leaves
GONE, STOPPED, SILENT = "gone", "stopped", "silent"  # how it is lost; or it has FAILED


class Clock:
    """Seconds during which this process could run.

    Args:
        longest: between two calls of `advance`. A longer time does not count: this process was suspended.

    Attributes:
        suspended: seconds before the last call that do not count.
    """

    def __init__(self, longest: float) -> None:
        self.now = self.suspended = 0.0
        self._longest = longest
        self._looked = time.monotonic()

    def advance(self) -> float:
        """Add the time since the last call. Returns what was added."""
        before, self._looked = self._looked, time.monotonic()
        passed = min(self._looked - before, self._longest)
        self.suspended = self._looked - before - passed
        self.now += passed
        return passed


class Lines:
    """JSON objects, one a line, over a connected socket. No call waits."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        self._received = b""
        self._unsent = b""

    def send(self, message: dict[str, Any]) -> None:
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        with suppress(OSError):  # full for now, or closed, which `receive` finds
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def beat(self) -> None:
        """Send an empty message, unless others wait to be sent: the receiver may be suspended."""
        self.flush()
        if not self._unsent:
            self.send({})

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """New messages, and whether the connection is closed. What is not a message closes it."""
        try:
            received = self.connection.recv(LONGEST)
            *lines, self._received = (self._received + received).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except BlockingIOError:
            return [], False
        except (OSError, ValueError):
            return [], True
        if len(self._received) > LONGEST or not all(isinstance(message, dict) for message in messages):
            return [], True
        return messages, not received

    def end(self, deadline: float) -> None:
        """Send what is left, and wait until the other side closes too: closing earlier might discard it."""
        with suppress(OSError):
            self.connection.settimeout(max(0.01, deadline - time.monotonic()))
            self.connection.sendall(self._unsent)
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline and self.connection.recv(LONGEST):
                self.connection.settimeout(max(0.01, deadline - time.monotonic()))


def describe_loss(rank: int, host: str, pid: int, how: str, seconds: float = 0.0) -> str:
    """What happened to a rank, in words."""
    what = {
        GONE: "was killed or exited",
        FAILED: "ended with an error",
        STOPPED: f"has been stopped (SIGSTOP) for {seconds:.0f} s",
        SILENT: f"has not answered for {seconds:.0f} s; its node may be down",
    }
    return f"rank {rank} (host {host}, pid {pid}) {what[how]}"
