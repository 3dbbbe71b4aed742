"""The end of torch's process group when a signal stops a rank, and waits that a lost rank ends."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from distil_tl.distributed import leaving
from distil_tl.distributed.store import Store, within
from distil_tl.utils.errors import PreemptedError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for torch's process group: what is called."""
    found: list[str] = []
    backend = SimpleNamespace(abort=lambda: found.append("abort"))
    group = SimpleNamespace(WORLD=SimpleNamespace(_get_backend=lambda device: backend))
    monkeypatch.setattr(dist, "group", group)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: found.append("destroy"))
    return found


def test_nccl_is_aborted_before_the_group_is_destroyed(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """To destroy it would wait for collectives that the other ranks have not joined."""
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    leaving.end_group(torch.device("cuda", 0))
    assert calls == ["abort", "destroy"]


def test_gloo_is_destroyed(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    leaving.end_group(torch.device("cuda", 0))
    leaving.end_group(torch.device("cpu"))
    assert calls == ["destroy", "destroy"]


def test_a_group_that_does_not_end_is_left(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(leaving, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(dist, "destroy_process_group", release.wait)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "gloo")
    leaving.end_group(torch.device("cpu"))
    release.set()


class LostSoon:
    """Stands in for a watchdog that reports a lost rank after some time."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def lost(self, wait: float = 0.0) -> str | None:
        return "rank 1 was killed" if time.monotonic() >= self.at else None


def test_waiting_ends_when_a_rank_is_lost() -> None:
    watchdog: Any = LostSoon(0.2)
    release = threading.Event()
    with pytest.raises(dist.DistStoreError, match="^rank 1 was killed"):
        within(600, release.wait, watchdog=watchdog)
    release.set()
    assert within(5, lambda: 3, watchdog=watchdog) == 3
    store = Store(HashStore(), 5.0, LostSoon(0.2))  # type: ignore[arg-type]
    for waiting in (store, store.below("x"), store.with_timeout(3)):
        with pytest.raises(dist.DistStoreError, match="^rank 1 was killed"):
            waiting.count_ranks("all", 9, 600)
    store.set_departure(PreemptedError("stopped"))
    with pytest.raises(PreemptedError):  # the reason, if there is one
        store.raise_if_ended()
