"""Copy of batches to the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distil_tl.data.loader import Batch


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, with images, targets and validity on `device`; `indices` stay on the CPU.

    On CUDA, batches are copied on a separate stream. The training process runs ahead of its GPU, so it requests a
    batch while the GPU still computes the previous one; copy and computation overlap. No batch is taken from
    `batches` before it is requested, so a position in the epoch stays exact.
    """
    return _Copies(batches, device) if device.type == "cuda" else batches


class _Copies(Iterator["Batch"]):
    """Batches on a CUDA device. If memory runs out in a copy, the next request copies the same batch."""

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._next: Batch | None = None

    def __next__(self) -> Batch:
        batch = self._next = next(self._batches) if self._next is None else self._next
        stream = copy_stream(self._device)
        moved: list[Tensor] = []

        def move(part: Tensor) -> Tensor:
            moved.append(part.to(self._device, non_blocking=True))
            return moved[-1]

        with torch.cuda.stream(stream):
            batch = batch.moved(move)
        self._next = None
        compute_stream = torch.cuda.current_stream(self._device)
        compute_stream.wait_stream(stream)
        for part in moved:
            part.record_stream(compute_stream)  # else its memory could be reused for the next copy while in use
        return batch


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies to a device. One for all loaders: torch keeps freed memory apart for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
