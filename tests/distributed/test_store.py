"""The store the ranks meet in: what it answers, and that it is not waited for once its process is frozen."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.store import Store, connect, within
from distil_tl.utils.errors import LostRanksError
from tests.helpers.ranks import free_port


def test_within_gives_what_the_work_gives() -> None:
    assert within(5, lambda: 3) == 3
    assert within(5, lambda: None) is None


def test_within_raises_what_the_work_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_work_that_takes_too_long_is_left_behind() -> None:
    hold = threading.Event()
    with pytest.raises(dist.DistStoreError, match=r"no answer in 0\.1 s"):
        within(0.1, hold.wait)
    hold.set()


class AskedToStopError(BaseException):
    pass


def test_a_signal_gets_through() -> None:
    def raises(*_: object) -> None:
        raise AskedToStopError

    before = signal.signal(signal.SIGALRM, raises)
    hold, began = threading.Event(), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(AskedToStopError):
            within(60, hold.wait)
    finally:
        signal.signal(signal.SIGALRM, before)
        hold.set()
    assert time.monotonic() - began < 30


LEAVES_A_THREAD = """
import atexit, sys, threading, time
from distil_tl.utils.command import leave, run_command
from distil_tl.utils.errors import PreemptedError
from distil_tl.distributed.store import within

def work():
    try:
        within(0.1, lambda: time.sleep(60))
    except Exception as error:
        print(error)
        raise PreemptedError("stopped") from error

atexit.register(lambda: print("in order"))
status = run_command("test", work)
threading.Thread(target=time.sleep, args=(600,)).start()  # which Python would wait for as it takes itself down
leave(status)
"""


def test_the_exit_status_does_not_hang_on_a_thread_that_is_left_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_A_THREAD], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3, done
    assert done.stdout.splitlines() == [
        "no answer in 0.1 s from the process that the ranks meet in",
        "in order",
    ]
    assert done.stderr == "test: stopped\n"


@pytest.fixture
def store() -> Store:
    return Store(HashStore(), 5.0)


def test_words_and_counts(store: Store) -> None:
    assert not store.check("a")
    store.set("a", "grüße")
    store.set("b", "2")
    assert store.check("a", "b")
    assert not store.check("a", "c")
    assert store.get("a") == "grüße"
    assert store.get_all(["b", "a"]) == ["2", "grüße"]
    assert [store.add("n", 1), store.add("n", 2), store.add("n", 0)] == [1, 3, 3]


def test_below_another_name_keys_are_others(store: Store) -> None:
    store.set("a", "1")
    store.below("x").set("a", "2")
    assert store.get("a") == "1"
    assert store.below("x").get("a") == "2"
    assert store.waiting(1).get("a") == "1"
    assert (store.waiting(1).seconds, store.waiting(9).seconds) == (1, 5)


def host(port: int, ready: Connection) -> None:
    kept = TCPStore("127.0.0.1", port, 1, is_master=True)
    kept.set("a", "1")
    ready.send(True)
    signal.pause()
    del kept


@pytest.fixture
def frozen() -> Iterator[Callable[[], int]]:
    """Starts a process that holds a store; the first call gives its port, the next one freezes it."""
    context = multiprocessing.get_context("spawn")
    port, (here, there) = free_port(), context.Pipe()
    process = context.Process(target=host, args=(port, there), daemon=True)

    def call() -> int:
        if process.pid is None:
            process.start()
            assert here.recv()
        else:
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # until it has
        return port

    yield call
    process.kill()
    process.join()


QUESTIONS: dict[str, Callable[[Store], Any]] = {  # what is set is only sent: there is no answer to wait for
    "get": lambda store: store.get("a"),
    "check": lambda store: store.check("a"),
    "add": lambda store: store.add("n", 1),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_frozen_store_is_not_waited_for(frozen: Callable[[], int], question: str) -> None:
    store = Store(TCPStore("127.0.0.1", frozen(), is_master=False), 1.0)
    QUESTIONS[question](store)
    frozen()
    with pytest.raises(dist.DistStoreError):
        QUESTIONS[question](store)


def test_nor_is_it_waited_for_to_connect(frozen: Callable[[], int]) -> None:
    launch = Launch(1, 2, 1, 2, url=f"tcp://127.0.0.1:{frozen()}", launcher="slurm")
    frozen()
    with pytest.raises(dist.DistStoreError):
        connect(launch, 1.0)


def test_ranks_that_do_not_come_are_missed(frozen: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun the store is there before any rank is."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launch = Launch(1, 2, 1, 2, url=f"tcp://127.0.0.1:{frozen()}", launcher="torchrun")
    with pytest.raises(LostRanksError, match="rank 1 did not meet the other ranks within"):
        connect(launch, 1.0)
