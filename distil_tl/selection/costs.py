"""The speed of a backbone on this machine."""

from __future__ import annotations

import time

import torch

from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.memory import free_memory, is_out_of_memory
from distil_tl.training.network import Prefix, dummy_images

BATCH, BATCH_CUDA = 8, 64  # images of a timed pass
SECONDS = 0.3  # of timed passes, at least


def images_per_second(info: DistInfo, prefix: Prefix, size: int) -> float | None:
    """The speed of all ranks together in forward passes of a frozen part, without loading images. A collective.

    None if a rank has too little memory for a single image.
    """
    rates = gather_objects(info, _rate(info.device, prefix, size))
    return None if None in rates else float(sum(rates))


def _rate(device: torch.device, prefix: Prefix, size: int) -> float | None:
    """The speed of this rank, with half the images as often as memory runs out."""
    count = BATCH_CUDA if device.type == "cuda" else BATCH
    while count:
        try:
            return _timed(device, prefix, size, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()  # after the block: until then the error refers to the tensors of the failed pass
        count //= 2
    return None


@torch.no_grad()
def _timed(device: torch.device, prefix: Prefix, size: int, count: int) -> float:
    images = dummy_images(count, size, device)
    prefix(images)
    _wait(device)
    began, passes = time.monotonic(), 0
    while passes < 2 or time.monotonic() - began < SECONDS:
        prefix(images)
        _wait(device)
        passes += 1
    return passes * len(images) / (time.monotonic() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
