"""The speed of a backbone on this machine."""

from __future__ import annotations

import time

import torch

from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.network import Prefix, dummy_images

BATCH, BATCH_CUDA = 8, 64  # images of a timed pass
SECONDS = 0.3  # of timed passes, at least


@torch.no_grad()
def images_per_second(info: DistInfo, prefix: Prefix, size: int) -> float:
    """The speed of all ranks together in forward passes of a frozen part, without loading images. A collective."""
    images = dummy_images(BATCH_CUDA if info.device.type == "cuda" else BATCH, size, info.device)
    prefix(images)
    _wait(info.device)
    began, passes = time.monotonic(), 0
    while passes < 2 or time.monotonic() - began < SECONDS:
        prefix(images)
        _wait(info.device)
        passes += 1
    rate = passes * len(images) / (time.monotonic() - began)
    return float(sum(gather_objects(info, rate)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
