"""The connections between the watchdogs: all are connected to that of rank 0. Only the standard library."""

from __future__ import annotations

import hmac
import selectors
import socket
import time
from contextlib import suppress
from typing import Any, NamedTuple

from distil_tl.distributed.watchdog.connection import FAILED, GONE, ORDERLY, STOPPED, Clock, Lines


class Peer:
    """The watchdog of another rank, and what is known of that rank.

    Attributes:
        heard_at: time of its last message.
        leaving: how the rank leaves, if it has said that it does.
    """

    def __init__(self, lines: Lines, rank: int, host: str, pid: int, heard_at: float) -> None:
        self.lines, self.rank, self.host, self.pid, self.heard_at = lines, rank, host, pid, heard_at
        self.leaving: str | None = None


class News(NamedTuple):
    """What another watchdog has reported: `kind` is a way to be lost, or one of the three below."""

    kind: str
    peer: Peer
    seconds: float = 0.0
    text: str = ""


CONNECTED, VERDICT, CLOSED = "connected", "verdict", "closed"  # rank 0's watchdog knows this one; decided; is gone


class Star:
    """The connections of one watchdog. `settings` are described in `process.py`.

    Attributes:
        is_hub: this is the watchdog of rank 0, to which the others connect.
        peers: the connected watchdogs by rank; for another than the hub at most the hub.
    """

    def __init__(self, settings: dict[str, Any], clock: Clock, selector: selectors.BaseSelector) -> None:
        self.settings, self.clock, self.selector = settings, clock, selector
        self.is_hub = settings["rank"] == 0
        self.peers: dict[int, Peer] = {}
        self._strangers: dict[Lines, float] = {}  # connections that have not said who they are, and since when
        self._listener: socket.socket | None = None
        if self.is_hub:
            self._listener = socket.socket(fileno=settings["socket"])
            self._listener.setblocking(False)
            selector.register(self._listener, selectors.EVENT_READ, self)
        elif settings["socket"] is not None:
            lines = Lines(socket.socket(fileno=settings["socket"]))
            lines.send({key: settings[key] for key in ("token", "rank", "host", "pid")})
            self.peers[0] = Peer(lines, 0, settings["hub_host"], settings["hub_pid"], clock.now)
            selector.register(lines.connection, selectors.EVENT_READ, self.peers[0])

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all connected watchdogs."""
        for peer in self.peers.values():
            peer.lines.send(message)

    def beat(self) -> None:
        """Send heartbeats, and forget connections that do not say who they are."""
        for peer in self.peers.values():
            peer.lines.beat()
        for lines, since in list(self._strangers.items()):
            if self.clock.now - since > self.settings["greeting"]:
                self._forget(lines)
                lines.connection.close()

    def silent(self, patience: float) -> list[tuple[Peer, float]]:
        """The watchdogs that have not sent anything for `patience` seconds, with the time."""
        times = [(peer, self.clock.now - peer.heard_at) for peer in self.peers.values()]
        return [(peer, seconds) for peer, seconds in times if seconds >= patience]

    def hear(self, source: object, leaving: str | None, verdict: str | None) -> list[News]:
        """Receive from a source that is ready. `leaving` and `verdict` are for a watchdog that has just connected."""
        if isinstance(source, Peer):
            messages, closed = source.lines.receive()
            return self._read(source, messages, closed)
        if isinstance(source, Lines):
            return self._identify(source, {"leaving": leaving, "verdict": verdict})
        if self._listener is not None:
            with suppress(OSError):
                connection, _ = self._listener.accept()
                lines = Lines(connection)
                self._strangers[lines] = self.clock.now
                self.selector.register(connection, selectors.EVENT_READ, lines)
        return []

    def end(self) -> None:
        """Close all connections. Nothing that was sent is lost."""
        deadline = time.monotonic() + 2
        for peer in self.peers.values():
            peer.lines.flush()
            with suppress(OSError):
                peer.lines.connection.shutdown(socket.SHUT_WR)
        for peer in self.peers.values():
            peer.lines.end(deadline)

    def _identify(self, lines: Lines, state: dict[str, Any]) -> list[News]:
        """The first message of a connection says of which rank it is, and proves with the token that it belongs."""
        messages, closed = lines.receive()
        if not messages and not closed:
            return []
        self._forget(lines)
        first = messages[0] if messages else {}
        rank, token = first.get("rank"), str(first.get("token"))
        belongs = hmac.compare_digest(token.encode(), self.settings["token"].encode())
        if not belongs or not isinstance(rank, int) or rank in self.peers or not 0 < rank < self.settings["world_size"]:
            lines.connection.close()
            return []
        peer = self.peers[rank] = Peer(lines, rank, str(first.get("host")), int(first["pid"]), self.clock.now)
        self.selector.register(lines.connection, selectors.EVENT_READ, peer)
        lines.send({"welcome": True, **state})
        return self._read(peer, messages[1:], closed)

    def _forget(self, lines: Lines) -> None:
        self.selector.unregister(lines.connection)
        del self._strangers[lines]

    def _read(self, peer: Peer, messages: list[dict[str, Any]], closed: bool) -> list[News]:
        peer.heard_at = self.clock.now
        news = []
        for message in messages:
            if message.get("leaving") in (ORDERLY, FAILED):
                peer.leaving = message["leaving"]
            if self.is_hub and message.get("lost") in (GONE, STOPPED, FAILED):
                news.append(News(message["lost"], peer, float(message.get("seconds", 0))))
            if not self.is_hub and message.get("welcome"):
                news.append(News(CONNECTED, peer))
            if not self.is_hub and message.get("verdict"):
                news.append(News(VERDICT, peer, text=str(message["verdict"])))
        if closed:
            self.selector.unregister(peer.lines.connection)
            peer.lines.connection.close()
            del self.peers[peer.rank]
            if peer.leaving != ORDERLY:
                news.append(News(peer.leaving or GONE, peer))
            news.append(News(CLOSED, peer))
        return news
