"""The store of the ranks: its answers, and its timeouts when its process is frozen."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.store import Store, _agree_on_name, connect, pause, within
from distil_tl.utils.errors import LostRanksError
from tests.helpers.ranks import free_port


def test_a_call_without_an_answer_is_an_error_of_the_store() -> None:
    release = threading.Event()
    with pytest.raises(dist.DistStoreError, match=r"no answer in 0\.1 s from the store of the ranks"):
        within(0.1, release.wait)
    with pytest.raises(dist.DistStoreError, match=r"no answer in 0\.1 s from rank 3"):
        within(0.1, release.wait, peer="rank 3")
    release.set()
    assert within(5, lambda: 3) == 3


@pytest.fixture
def store() -> Store:
    return Store(HashStore(), 5.0)


def test_values_and_counters(store: Store) -> None:
    assert not store.check("a")
    store.set("a", "grüße")
    store.set("b", "2")
    assert store.check("a", "b")
    assert not store.check("a", "c")
    assert store.get("a") == "grüße"
    assert store.get_all(["b", "a"]) == ["2", "grüße"]
    assert [store.add("n", 1), store.add("n", 2), store.add("n", 0)] == [1, 3, 3]


def test_keys_below_a_prefix_are_separate(store: Store) -> None:
    store.set("a", "1")
    store.below("x").set("a", "2")
    assert store.get("a") == "1"
    assert store.below("x").get("a") == "2"
    assert store.with_timeout(1).get("a") == "1"
    assert (store.with_timeout(1).seconds, store.with_timeout(9).seconds) == (1, 5)


class View:
    """Another count of the same store, for one rank."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.keys, self.requests = inner, 0, 0

    def __getattr__(self, name: str) -> Any:
        work = getattr(self.inner, name)

        def request(keys: Any, *args: Any) -> Any:
            self.keys += len(keys) if isinstance(keys, list) else 1
            self.requests += 1
            return work(keys, *args)

        return request


def names_of_start(ranks: int, inner: Any, late: frozenset[int] = frozenset()) -> tuple[dict[int, str], list[View]]:
    """The names by rank on which ranks in threads agree, and the requests of each. Those in `late` never come."""
    views = [View(inner) for _ in range(ranks)]
    names: dict[int, str] = {}

    def agree(rank: int) -> None:
        with suppress(LostRanksError):
            timeout = 0.5 if late else 60.0
            names[rank] = _agree_on_name(Store(views[rank], 60.0), Launch(rank, ranks, rank, ranks), timeout)

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in range(ranks) if rank not in late]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names, views


def test_each_start_gets_its_own_name_though_the_store_keeps_the_keys() -> None:
    inner = HashStore()
    first, _ = names_of_start(4, inner)
    assert len(first) == 4
    assert len(set(first.values())) == 1
    broken, _ = names_of_start(4, inner, late=frozenset({2}))  # a start that does not become complete
    assert broken == {}
    again, _ = names_of_start(4, inner)
    assert len(again) == 4
    assert len(set(again.values())) == 1
    assert set(again.values()).isdisjoint(first.values())


def test_only_rank_0_requests_the_keys_of_all_ranks() -> None:
    names, views = names_of_start(16, HashStore())
    assert len(set(names.values())) == 1
    assert views[0].keys > 16
    assert max(view.keys / view.requests for view in views[1:]) == 1


def test_waiting_ranks_do_not_overload_the_store() -> None:
    assert pause(8) < 0.06
    assert all(ranks / pause(ranks) <= 5000 for ranks in (1, 256, 4096, 100_000))


def host(port: int, ready: Connection) -> None:
    kept = TCPStore("127.0.0.1", port, 1, is_master=True)
    kept.set("a", "1")
    ready.send(True)
    signal.pause()
    del kept


@pytest.fixture
def frozen() -> Iterator[Callable[[], int]]:
    """A function: its first call starts a process that serves a store and returns its port, the next freezes it."""
    context = multiprocessing.get_context("spawn")
    port, (here, there) = free_port(), context.Pipe()
    process = context.Process(target=host, args=(port, there), daemon=True)

    def call() -> int:
        if process.pid is None:
            process.start()
            assert here.recv()
        else:
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # until it is frozen
        return port

    yield call
    process.kill()
    process.join()


REQUESTS: dict[str, Callable[[Store], Any]] = {  # not "set", which has no answer
    "get": lambda store: store.get("a"),
    "check": lambda store: store.check("a"),
    "add": lambda store: store.add("n", 1),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_to_a_frozen_store_times_out(frozen: Callable[[], int], request_: str) -> None:
    store = Store(TCPStore("127.0.0.1", frozen(), is_master=False), 1.0)
    REQUESTS[request_](store)
    frozen()
    with pytest.raises(dist.DistStoreError):
        REQUESTS[request_](store)


def test_a_connection_to_a_frozen_store_times_out(frozen: Callable[[], int]) -> None:
    launch = Launch(1, 2, 1, 2, url=f"tcp://127.0.0.1:{frozen()}", launcher="slurm")
    frozen()
    with pytest.raises(dist.DistStoreError):
        connect(launch, 1.0)


def test_ranks_that_do_not_connect_are_an_error(frozen: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun the store exists before any rank connects."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launch = Launch(1, 2, 1, 2, url=f"tcp://127.0.0.1:{frozen()}", launcher="torchrun")
    with pytest.raises(LostRanksError, match="rank 1 did not connect to the other ranks within"):
        connect(launch, 1.0)
