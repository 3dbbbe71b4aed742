"""Watchdogs: real ones, each beside a process that stands in for a rank."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distil_tl.distributed import meeting
from distil_tl.distributed.watchdog import client
from distil_tl.distributed.watchdog.client import RankWatchdog, connect_to_hub, open_hub
from distil_tl.distributed.watchdog.connection import Clock, Lines
from distil_tl.utils.log import logger

TIMES = {"tick": 0.1, "grace": 0.5, "forced_exit": 0.5, "doubt": 0.2, "greeting": 5.0}
WITHIN = 60.0  # seconds, enough for a busy machine


def wait_until(condition: Callable[[], object], message: object = "") -> None:
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


class Star:
    """Stand-ins for ranks, processes that do nothing, with their watchdogs."""

    def __init__(self, ranks: int, heartbeat: float | None = None, **settings: Any) -> None:
        listener, hub = open_hub(everywhere=False)
        hub |= {"hub_host": "n0", "world_size": ranks, "heartbeat": heartbeat}
        hub |= {**TIMES, **settings}
        self.hub = hub
        self.processes = [subprocess.Popen(["sleep", "600"]) for _ in range(ranks)]
        hub["hub_pid"] = self.processes[0].pid
        self.watchdogs = [RankWatchdog() for _ in range(ranks)]
        for rank, (watchdog, process) in enumerate(zip(self.watchdogs, self.processes, strict=True)):
            own = {"rank": rank, "host": f"n{rank}", "pid": process.pid}
            watchdog.start({**hub, **own}, listener if rank == 0 else connect_to_hub(["127.0.0.1"], hub["port"]))

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    def watchdog_pid(self, rank: int) -> int:
        process = self.watchdogs[rank].process
        assert process is not None
        return process.pid

    def verdict(self, rank: int) -> str | None:
        return self.watchdogs[rank].lost(wait=WITHIN)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for watchdog in self.watchdogs:
            if watchdog.process is not None:
                watchdog.process.send_signal(signal.SIGCONT)
                watchdog.process.wait(WITHIN)


@pytest.fixture
def star(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Star]]:
    """Starts a star. Its watchdogs can only kill: the process of the test must not arm its own exit."""
    monkeypatch.setattr(client, "arm", lambda: None)
    found: list[Star] = []

    def start(*args: Any, **options: Any) -> Star:
        found.append(Star(*args, **options))
        assert all(watchdog.is_connected(WITHIN) for watchdog in found[-1].watchdogs[1:])
        return found[-1]

    yield start
    for one in found:
        one.close()


@pytest.mark.parametrize("by", [0, 1])
def test_a_killed_rank_ends_the_others_and_all_name_it(
    star: Callable[..., Star], by: int, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ranks = star(3)
    ranks.watchdogs[2].log_to(tmp_path / "rank-2.log")
    ranks.processes[by].kill()
    said = f"rank {by} (host n{by}, pid {ranks.pid(by)}) was killed or exited"
    for rank in {0, 1, 2} - {by}:
        assert ranks.verdict(rank) == said
        assert ranks.processes[rank].wait(WITHIN) == -signal.SIGKILL
    assert ranks.watchdogs[2].process is not None
    ranks.watchdogs[2].process.wait(WITHIN)
    line = f"rank 2 is ended by its watchdog: {said}. See the logs"
    assert f"distil_tl: {line}" in capfd.readouterr().err
    assert f" ERROR {line}" in (tmp_path / "rank-2.log").read_text()


def test_a_rank_that_leaves_may_finish_but_not_for_ever(star: Callable[..., Star]) -> None:
    ranks = star(3)
    ranks.watchdogs[1].leave(orderly=False, seconds=None)
    ranks.watchdogs[2].leave(orderly=False, seconds=0.5)
    assert ranks.processes[2].wait(WITHIN) == -signal.SIGKILL
    assert ranks.verdict(0) == f"rank 2 (host n2, pid {ranks.pid(2)}) ended with an error"
    assert ranks.processes[0].wait(WITHIN) == -signal.SIGKILL
    assert ranks.processes[1].poll() is None


def test_ranks_that_end_in_an_orderly_way_end_nobody(star: Callable[..., Star]) -> None:
    ranks = star(3)
    ranks.watchdogs[1].leave(orderly=True, seconds=None)
    ranks.processes[1].kill()
    assert ranks.watchdogs[1].process is not None
    ranks.watchdogs[1].process.wait(WITHIN)
    ranks.watchdogs[0].leave(orderly=True, seconds=60)
    ranks.watchdogs[0].close()  # as at the end of a run; the process lives on
    began = time.monotonic()
    ranks.watchdogs[2].wait_for_end_of_rank_zero(WITHIN)
    assert time.monotonic() - began < WITHIN
    assert ranks.watchdogs[2].lost(wait=1.0) is None
    assert ranks.processes[0].poll() is None
    assert ranks.processes[2].poll() is None


def test_what_a_rank_says_just_before_it_exits_is_heard(star: Callable[..., Star]) -> None:
    ranks = star(3)
    os.kill(ranks.watchdog_pid(1), signal.SIGSTOP)  # it notices the exit and the message at the same time
    ranks.processes[1].kill()
    ranks.processes[1].wait()
    ranks.watchdogs[1].leave(orderly=True, seconds=None)
    os.kill(ranks.watchdog_pid(1), signal.SIGCONT)
    assert ranks.watchdogs[1].process is not None
    ranks.watchdogs[1].process.wait(WITHIN)
    assert ranks.watchdogs[2].lost(wait=1.0) is None


def test_an_error_is_not_blamed_if_another_rank_was_killed(star: Callable[..., Star]) -> None:
    """The killed rank's watchdog reports later than the rank that got an error because of it."""
    ranks = star(3, doubt=120.0)
    os.kill(ranks.watchdog_pid(2), signal.SIGSTOP)
    ranks.processes[2].kill()
    ranks.watchdogs[1].leave(orderly=False, seconds=60)
    ranks.processes[1].kill()
    assert ranks.watchdogs[1].process is not None
    ranks.watchdogs[1].process.wait(WITHIN)
    os.kill(ranks.watchdog_pid(2), signal.SIGCONT)
    assert ranks.verdict(0) == f"rank 2 (host n2, pid {ranks.pid(2)}) was killed or exited"


@pytest.mark.parametrize("by", [0, 1])
def test_a_stopped_rank_ends_all(star: Callable[..., Star], by: int) -> None:
    ranks = star(2, heartbeat=1.0)
    os.kill(ranks.pid(by), signal.SIGSTOP)
    verdict = ranks.verdict(1 - by)
    assert verdict is not None
    assert verdict.startswith(f"rank {by} (host n{by}, pid {ranks.pid(by)}) has been stopped (SIGSTOP) for ")
    assert [process.wait(WITHIN) for process in ranks.processes] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("by", [0, 1])
def test_a_node_that_does_not_answer_ends_all(star: Callable[..., Star], by: int) -> None:
    ranks = star(2, heartbeat=1.0)
    for pid in (ranks.pid(by), ranks.watchdog_pid(by)):
        os.kill(pid, signal.SIGSTOP)
    verdict = ranks.verdict(1 - by)
    assert verdict is not None
    assert verdict.startswith(f"rank {by} (host n{by}, pid {ranks.pid(by)}) has not answered for ")
    assert ranks.processes[1 - by].wait(WITHIN) == -signal.SIGKILL


def test_a_job_that_is_suspended_and_resumed_goes_on(star: Callable[..., Star]) -> None:
    ranks = star(3, heartbeat=2.0, suspended=1.0)
    pids = [pid for rank in range(3) for pid in (ranks.pid(rank), ranks.watchdog_pid(rank))]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(3 if number == signal.SIGSTOP else 1)
    assert [ranks.watchdogs[rank].lost() for rank in range(3)] == [None] * 3
    assert all(1 < ranks.watchdogs[rank].suspended(within=WITHIN, wait=WITHIN) < WITHIN for rank in range(3))
    assert ranks.watchdogs[0].suspended(within=0.1) == 0, "that is over"
    ranks.processes[1].kill()  # they still watch
    assert ranks.verdict(2) == f"rank 1 (host n1, pid {ranks.pid(1)}) was killed or exited"


def test_without_heartbeat_only_the_dead_are_noticed(star: Callable[..., Star]) -> None:
    ranks = star(2, heartbeat=None)
    os.kill(ranks.pid(1), signal.SIGSTOP)
    assert ranks.watchdogs[0].lost(wait=1.0) is None
    ranks.processes[1].kill()
    assert ranks.verdict(0) == f"rank 1 (host n1, pid {ranks.pid(1)}) was killed or exited"


def test_only_time_in_which_the_observer_ran_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.5, 1.5, 1000.0, 1000.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = Clock(longest=2.0)
    assert [(clock.advance(), clock.suspended) for _ in range(3)] == [(0.5, 0), (1.0, 0), (2.0, 996.5)]
    assert clock.advance() == 0.5
    assert clock.now == 4.0
    assert clock.suspended == 0


def test_many_ranks_send_fewer_heartbeats_and_several_come_in_time() -> None:
    assert meeting.seconds_between_heartbeats(2, 60.0) == 1.0
    assert meeting.seconds_between_heartbeats(1024, None) == 4.0
    assert meeting.seconds_between_heartbeats(4096, 60.0) == 6.0
    assert meeting.seconds_between_heartbeats(2, 2.0) == 0.2


def test_signals_to_the_whole_job_do_not_end_a_watchdog(star: Callable[..., Star]) -> None:
    ranks = star(2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(ranks.watchdog_pid(0), number)
        os.kill(ranks.watchdog_pid(1), number)
    ranks.processes[1].kill()
    assert ranks.verdict(0) == f"rank 1 (host n1, pid {ranks.pid(1)}) was killed or exited"


def test_a_stranger_is_not_heard(star: Callable[..., Star]) -> None:
    ranks = star(2, world_size=9)
    guess = b'{"token": "guessed", "rank": 5, "host": "x", "pid": 1}\n'
    for first in (b"GET / HTTP/1.0\r\n\r\n", guess, b"[1]\n", b"\xff" * 99999):
        with socket.create_connection(("127.0.0.1", ranks.hub["port"]), timeout=WITHIN) as stranger:
            stranger.sendall(first + b'{"lost": "gone"}\n')
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
    assert ranks.watchdogs[0].lost(wait=0.3) is None


def test_a_hub_that_is_not_reached_is_a_warning(
    star: Callable[..., Star], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setattr(logger, "propagate", True)
    alone, process = RankWatchdog(), subprocess.Popen(["sleep", "600"])
    settings = {"port": port, "token": "x", "hub_host": "n0", "hub_pid": 1, "rank": 1, "world_size": 2, "host": "n1"}
    meeting._start_other(alone, {**settings, "pid": process.pid, "heartbeat": 1.0, **TIMES}, ["127.0.0.1"])
    assert f"rank 1 can't reach the watchdog of rank 0 at 127.0.0.1:{port} (" in caplog.text
    alone.wait_for_end_of_rank_zero(WITHIN)  # which would not be noticed
    assert alone.lost(wait=0.5) is None
    assert process.poll() is None
    alone.leave(orderly=False, seconds=0.1)  # it still ends its own rank
    assert process.wait(WITHIN) == -signal.SIGKILL
    assert alone.process is not None
    assert alone.process.wait(WITHIN) == 0


def test_messages_that_arrive_in_pieces() -> None:
    here, there = socket.socketpair()
    lines = Lines(here)
    assert lines.receive() == ([], False)
    there.sendall(b'{"a": 1}\n{"b"')
    assert lines.receive() == ([{"a": 1}], False)
    there.sendall(b": 2}\n{}\n")
    assert lines.receive() == ([{"b": 2}, {}], False)
    there.close()
    assert lines.receive() == ([], True)


HOLDS_THE_LOCK = """
import ctypes, sys
from distil_tl.distributed.watchdog.forced_exit import arm
pipe = arm()
assert pipe == arm()
print(pipe, flush=True)
ctypes.PyDLL(None).sleep(600)  # without releasing Python's lock
"""


def test_a_process_that_can_not_run_python_exits_with_status_1() -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    number = process.stdout.readline().strip()
    assert number.isdigit(), "this system needs SIGKILL"
    wait_until(lambda: Path(f"/proc/{process.pid}/wchan").exists())
    assert process.poll() is None
    with Path(f"/proc/{process.pid}/fd/{number}").open("wb") as pipe:
        pipe.write(b"x")
    assert process.wait(WITHIN) == 1
