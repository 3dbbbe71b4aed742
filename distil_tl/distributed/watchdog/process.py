"""The process that watches one rank, and ends it when another rank is dead or frozen.

`client.py` starts it beside each rank, without torch or a GPU. It is a process because a rank that is blocked in C++
code may run no Python, in any thread.

Each watchdog observes only its own rank, which may be gone or stopped; a rank that computes, compiles, holds Python's
lock or waits for a disk is neither. The watchdogs of a run form a star: that of rank 0 collects what the others report,
closed connections and silence, and tells the first verdict to all. A rank that has said that it leaves may exit.
After a verdict each rank gets some seconds to notice by itself, and to end with its own message. Then its watchdog ends
it, with status 1. The time in which a watchdog itself was suspended does not count.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from distil_tl.distributed.watchdog.connection import (
    FAILED,
    GONE,
    ORDERLY,
    SILENT,
    STOPPED,
    Clock,
    Lines,
    describe_loss,
)
from distil_tl.distributed.watchdog.own_rank import OwnRank
from distil_tl.distributed.watchdog.star import CLOSED, CONNECTED, VERDICT, News, Star

WRITE = 2.0  # seconds for a last message: the file system of the log may hang
NEVER = float("inf")


class Watchdog:
    """One watchdog.

    Args:
        settings: from `client.py`. `rank`, `world_size`, `host`, `pid`: of its rank. `heartbeat`: seconds, or None.
            `exit_pipe`: a descriptor, see `forced_exit.py`; or None. `token`: a secret that all watchdogs of the run
            know. `socket`: a descriptor, to which the others connect, or that is connected to the hub; None if that
            could not be reached. `hub_host`, `hub_pid`: the process of rank 0. `tick`: seconds between heartbeats. And
            those of `client.TIMES`.

    Attributes:
        verdict: which rank is lost, in words.
        doubtful: a verdict that waits for a better explanation, and until when.
        end_at: when its rank is ended.
        kill_at: when it is killed because it has not exited.
    """

    def __init__(self, control: Lines, settings: dict[str, Any]) -> None:
        self.control, self.settings = control, settings
        self.tick: float = settings["tick"]
        # All ranks end within `heartbeat`, so the verdict comes earlier.
        heartbeat = settings["heartbeat"]
        ending = settings["grace"] + settings["forced_exit"]
        self.patience = NEVER if heartbeat is None else max(heartbeat / 2, heartbeat - ending)
        self.own = OwnRank(settings["pid"])
        self.clock = Clock(longest=2 * self.tick)
        self.selector = selectors.DefaultSelector()
        self.star = Star(settings, self.clock, self.selector)
        self.verdict: str | None = None
        self.doubtful: tuple[str, float] | None = None
        self.end_at = self.kill_at = NEVER
        self.log: str | None = None
        self.done = False
        self.selector.register(control.connection, selectors.EVENT_READ, control)
        if self.own.descriptor is not None:
            self.selector.register(self.own.descriptor, selectors.EVENT_READ, self.own)

    def run(self) -> None:
        """Watch until the rank is gone or has left."""
        next_tick = time.monotonic()
        while not self.done:
            urgent = self.doubtful is not None or min(self.end_at, self.kill_at) < NEVER
            wait = min(next_tick - time.monotonic(), 0.1 if urgent else self.tick)
            events = self.selector.select(max(0.0, wait))
            self.own.observe(self.clock.advance())
            if self.clock.suspended >= self.settings["suspended"]:
                self.control.send({"suspended": self.clock.suspended, "until": time.monotonic()})
            for key, _ in events:
                self.handle(key.data)
            if time.monotonic() >= next_tick and not self.done:
                next_tick = time.monotonic() + self.tick
                self.star.beat()
                if self.own.is_gone():
                    self.rank_is_gone()
            if not self.done:
                self.check_times()
        self.star.end()

    def handle(self, source: object) -> None:
        """Receive what has arrived from one source."""
        if self.done:
            return
        if source is self.own or (source is self.control and self.hear_rank()):
            self.rank_is_gone()
        elif source is not self.control:
            for news in self.star.hear(source, self.own.leaving, self.verdict):
                self.consider(news)

    def consider(self, news: News) -> None:
        peer = news.peer
        if news.kind == CONNECTED:
            self.control.send({"connected": True})
        elif news.kind == VERDICT:
            self.announce(news.text)
        elif news.kind != CLOSED:
            self.decide(describe_loss(peer.rank, peer.host, peer.pid, news.kind, news.seconds), news.kind)
        elif peer.rank == 0:
            self.control.send({"rank_zero_ended": True})

    def check_times(self) -> None:
        """Act on the deadlines that have passed."""
        now, own = self.clock.now, self.own
        if own.stopped_for >= self.patience and self.end_at == NEVER:
            self.report(STOPPED, own.stopped_for)
            self.end_at = now  # at once, as the others wait for it
        for peer, seconds in self.star.silent(self.patience):
            self.decide(describe_loss(peer.rank, peer.host, peer.pid, SILENT, seconds), SILENT)
        if self.doubtful is not None and now >= self.doubtful[1]:
            self.announce(self.doubtful[0])
        if now >= self.kill_at:
            own.kill(signal.SIGKILL)
        elif self.kill_at == NEVER and now >= self.end_at:
            self.end_rank(self.verdict or f"it has been stopped (SIGSTOP) for {own.stopped_for:.0f} s")
        elif self.kill_at == NEVER and now >= own.leaves_by:
            self.end_rank("it has not ended by itself")

    def hear_rank(self) -> bool:
        """What the rank itself says: that it leaves, within which time, or where its log is.

        Returns whether it has closed the connection.
        """
        messages, closed = self.control.receive()
        for message in messages:
            self.log = message.get("log", self.log)
            if message.get("leaving") in (ORDERLY, FAILED):
                seconds = message.get("seconds")
                self.own.leaving = message["leaving"]
                self.own.leaves_by = NEVER if seconds is None else self.clock.now + seconds
                self.end_at = NEVER
                self.star.tell({"leaving": self.own.leaving})
        return closed

    def rank_is_gone(self) -> None:
        """The rank has exited; or it has closed its connection, and has said before that it leaves."""
        self.done = True
        self.hear_rank()  # it may have said so just before it exited
        if self.own.leaving != ORDERLY:
            self.report(self.own.leaving or GONE)
        if self.doubtful is not None:
            self.announce(self.doubtful[0])

    def report(self, how: str, seconds: float = 0.0) -> None:
        """Tell the hub what happened to the rank of this watchdog."""
        settings = self.settings
        if self.star.is_hub:
            self.decide(describe_loss(0, settings["host"], settings["pid"], how, seconds), how)
        else:
            self.star.tell({"lost": how, "seconds": seconds})

    def decide(self, loss: str, how: str) -> None:
        """A rank is lost. If it has failed, the death of another one may still turn out to be the reason."""
        if how == FAILED and not self.done and self.verdict is None:
            self.doubtful = self.doubtful or (loss, self.clock.now + self.settings["doubt"])
        else:
            self.announce(loss)

    def announce(self, verdict: str) -> None:
        """Tell the first verdict to all, and give the rank of this watchdog some time to notice."""
        self.doubtful = None
        if self.verdict is not None:
            return
        self.verdict = verdict
        self.control.send({"verdict": verdict})
        if self.star.is_hub:
            self.star.tell({"verdict": verdict})
        if self.own.leaving is None:
            self.end_at = self.clock.now + self.settings["grace"]

    def end_rank(self, why: str) -> None:
        """End the rank with status 1, also if its main thread is blocked."""
        self.kill_at = self.clock.now + self.settings["forced_exit"]
        self.write(
            f"rank {self.settings['rank']} is ended by its watchdog: {why}. See the logs of the ranks; if one was "
            f"killed, dmesg on its host shows whether memory ran out. The same command resumes from the last checkpoint"
        )
        if self.settings["exit_pipe"] is None:
            self.own.kill(signal.SIGKILL)
            return
        with suppress(OSError):
            os.write(self.settings["exit_pipe"], b"x")
        self.own.kill(signal.SIGCONT)  # a stopped process can't exit

    def write(self, text: str) -> None:
        """Write a message to standard error and to the log of the rank. Both may hang."""
        writer = threading.Thread(target=self._write, args=(text,), daemon=True)
        writer.start()
        writer.join(WRITE)

    def _write(self, text: str) -> None:
        with suppress(OSError):
            os.write(2, f"distil_tl: {text}\n".encode())
        if self.log is not None:
            with suppress(OSError), open(self.log, "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(time.strftime(f"%Y-%m-%d %H:%M:%S,000 ERROR {text.replace('%', '%%')}\n"))


def main(descriptor: int) -> None:
    """Watch the rank that has started this process. `descriptor` is of the connection to it."""
    # Slurm and terminals send signals to whole groups of processes, and mean the ranks.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    control = socket.socket(fileno=descriptor)
    first = b""
    while not first.endswith(b"\n"):  # a byte at a time, as further messages may follow
        received = control.recv(1)
        if not received:
            return
        first += received
    with suppress(OSError, ValueError):  # one connection for each rank
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    watchdog = Watchdog(Lines(control), json.loads(first))
    try:
        watchdog.run()
    except Exception as error:  # must not end the run
        watchdog.write(f"the watchdog of rank {watchdog.settings['rank']} failed: {error!r}. Training continues")
        watchdog.star.tell({"leaving": ORDERLY})
        watchdog.star.end()
        while not watchdog.own.is_gone():  # else it would be a zombie
            time.sleep(1)
