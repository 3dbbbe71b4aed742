"""Devices that run out of memory, for tests: errors at a chosen place, as torch raises them."""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.network import FeatureNetwork, ImageNetwork, Network, SplitNetwork
from tests.helpers.ranks import rank, train

NETWORKS = (ImageNetwork, FeatureNetwork, SplitNetwork)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class _Fails(torch.autograd.Function):
    """The identity, whose gradient runs out of memory."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        raise out_of_memory()


class SmallDevice:
    """Fails in forward or backward passes of more than two images, at random.

    Args:
        chance: that a pass in training fails.
        seed: of the chances.
        place: `forward`, `loss`, `backward` or `any`, which is one of the other two than `loss`.
    """

    def __init__(self, chance: float, seed: int, place: str = "any") -> None:
        self.random = random.Random(f"{seed} {rank()}")
        self.chance = chance
        self.place = place
        self.failures = 0

    def call(self, original: Any, network: Network, images: Tensor) -> Tensor:
        fails = len(images) > 2 and network.training and self.random.random() < self.chance
        if self.place == "loss":
            fails = False
        backward = self.place == "backward" or (self.place == "any" and self.random.random() < 0.5)
        self.failures += fails
        if fails and not backward:
            original(network, images)  # with its effects on statistics
            raise out_of_memory()
        logits: Tensor = original(network, images)
        return _Fails.apply(logits) if fails else logits

    def loss(self, original: Any, logits: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.place == "loss" and logits.requires_grad and len(logits) > 2 and self.random.random() < self.chance:
            self.failures += 1
            raise out_of_memory()
        losses: Tensor = original(logits, *args, **options)
        return losses

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        originals = {network: network.forward for network in NETWORKS}

        def patched(original: Any) -> Any:
            return lambda network, images: self.call(original, network, images)

        for network, original in originals.items():
            network.forward = patched(original)  # type: ignore[method-assign]
        cross_entropy = functional.cross_entropy
        functional.cross_entropy = functools.partial(self.loss, cross_entropy)
        try:
            yield
        finally:
            functional.cross_entropy = cross_entropy
            for network, original in originals.items():
                network.forward = original  # type: ignore[method-assign]


def train_on_small_device(args: list[str], chance: float, seed: int, place: str) -> tuple[list[int], int]:
    """Train, again as long as the process would start again. Returns the exit statuses and the number of failures."""
    device, statuses = SmallDevice(chance, seed, place), list[int]()
    with device.applied():
        while not statuses or statuses[-1] == 4:
            if statuses and "MASTER_PORT" in os.environ:  # the store of this process is gone
                os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
            statuses.append(train(args))
    return statuses, device.failures


def info_of_one() -> DistInfo:
    from distil_tl.distributed.launch_env import Launch

    return DistInfo(Launch(), torch.device("cpu"), 60)
