"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from distil_tl.data.loader import Batch


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, with images, targets and validity on `device`; `indices` stay where they are.

    On CUDA they are copied on a stream of their own. The process that trains runs ahead of its GPU, so it asks for a
    batch while the GPU still computes on the one before, and the copy is made meanwhile. No batch is taken from
    `batches` before it is asked for, so a position in them means what it says.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = [part.to(device, non_blocking=True) for part in (batch.images, batch.targets, batch.valid)]
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for part in moved:
            part.record_stream(computing)  # else its memory were free for the next copy while it is still read
        images, targets, valid = moved
        yield batch._replace(images=images, targets=targets, valid=valid)
