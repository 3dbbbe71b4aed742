"""Copy of batches to the device: nothing is requested too early, nothing is damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distil_tl.data import device
from distil_tl.data.device import to_device
from distil_tl.data.loader import Batch

CPU = torch.device("cpu")


def batches(count: int, taken: list[int], *, pinned: bool = False) -> Iterator[Batch]:
    def part(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if pinned else tensor

    for i in range(count):
        taken.append(i)
        images = torch.full((64, 3, 64, 64), i, dtype=torch.uint8)
        numbers = torch.full((64,), i)
        yield Batch(part(images), part(numbers), numbers, part(numbers > -1), [(i, "why")])


def test_on_a_cpu_batches_are_unchanged() -> None:
    taken: list[int] = []
    given = list(batches(3, taken))
    assert all(a is b for a, b in zip(to_device(iter(given), CPU), given, strict=True))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_batch_is_taken_before_it_is_requested(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    taken: list[int] = []
    moved = to_device(batches(3, taken), torch.device(kind))
    assert taken == []
    for i in range(3):
        next(moved)
        assert taken == list(range(i + 1))


def test_a_copy_that_runs_out_of_memory_does_not_lose_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, other: object) -> None: ...

    taken: list[int] = []
    failures = iter([False, True, True, False])

    def copy(tensor: Tensor, *args: object, **options: object) -> Tensor:
        if tensor.ndim == 4 and next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor

    monkeypatch.setattr(device, "copy_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Tensor, "to", copy)
    moved = to_device(batches(2, taken), torch.device("cuda"))
    assert int(next(moved).indices[0]) == 0
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            next(moved)
    assert int(next(moved).indices[0]) == 1
    assert taken == [0, 1]
    assert list(moved) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_busy_gpu_batches_arrive_undamaged() -> None:
    cuda, sums = torch.device("cuda"), []
    busy = torch.rand(4096, 4096, device=cuda)
    for batch in to_device(batches(40, [], pinned=True), cuda):
        assert {batch.images.device.type, batch.targets.device.type, batch.valid.device.type} == {"cuda"}
        assert batch.indices.device == CPU
        assert batch.faults == [(int(batch.indices[0]), "why")]
        for _ in range(3):
            busy = torch.nn.functional.normalize(busy @ busy)
        sums.append(batch.images.long().sum() + batch.targets.sum())
        del batch
    assert [int(s) for s in sums] == [i * (64 * 3 * 64 * 64 + 64) for i in range(40)]
