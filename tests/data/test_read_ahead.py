"""Batches that a thread makes: the same, in order, a limited number ahead, and no thread is left."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from distil_tl.data import read_ahead
from distil_tl.data.loader import Batch
from distil_tl.data.read_ahead import PinnedLoader, ReadAhead


def batch_of(i: int) -> Batch:
    return Batch(torch.tensor([i]), torch.tensor([i]), torch.tensor([i]), torch.tensor([True]), [])


def source(count: int, taken: list[int], fail_at: int | None = None) -> Iterator[Batch]:
    for i in range(count):
        if i == fail_at:
            raise OSError(5, "Input/output error")
        taken.append(i)
        yield batch_of(i)


def doubled(batch: Batch) -> Batch:
    return batch._replace(images=batch.images * 2)


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.005)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def test_all_batches_come_in_order_and_prepared() -> None:
    batches = ReadAhead(source(20, []), 3, doubled)
    assert [int(batch.images) for batch in batches] == [2 * i for i in range(20)]
    with pytest.raises(StopIteration):
        next(batches)


def test_only_some_are_made_ahead() -> None:
    taken: list[int] = []
    batches = ReadAhead(source(20, taken), 3, doubled)
    wait_for(lambda: len(taken) == 3)
    for i in range(3, 10):
        next(batches)
        wait_for(lambda made=i + 1: len(taken) == made)  # type: ignore[misc]
    time.sleep(0.05)
    assert len(taken) == 10


def test_an_error_comes_where_its_batch_would() -> None:
    batches = ReadAhead(source(20, [], fail_at=2), 5, doubled)
    assert [int(next(batches).images) for _ in range(2)] == [0, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            next(batches)


def test_the_thread_ends_with_the_object_and_with_the_last_batch() -> None:
    batches = ReadAhead(source(20, []), 3, doubled)
    next(batches)
    assert len(threads()) == 1
    del batches
    gc.collect()
    assert threads() == []
    whole = ReadAhead(source(2, []), 3, doubled)
    assert len(list(whole)) == 2
    wait_for(lambda: not threads())


def test_a_pinned_loader_pins_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has its own current device; without setting it, every rank would use memory of GPU 0."""
    devices: dict[str, torch.device] = {}
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.setdefault(threading.current_thread().name, device)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(read_ahead, "pinned", doubled)
    loader = PinnedLoader([batch_of(i) for i in range(5)], torch.device("cuda:3"), 2)
    for _ in range(2):
        assert [int(batch.images) for batch in loader] == [0, 2, 4, 6, 8]
    assert devices == {"read ahead": torch.device("cuda:3")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches() -> None:
    batches = list(PinnedLoader([batch_of(i) for i in range(5)], torch.device("cuda:0"), 2))
    assert [int(batch.images) for batch in batches] == list(range(5))
    assert all(batch.images.is_pinned() and batch.targets.is_pinned() and batch.valid.is_pinned() for batch in batches)
