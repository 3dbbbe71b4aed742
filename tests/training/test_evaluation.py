"""The evaluation of a split: every sample once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distil_tl.data.loader import Batch
from distil_tl.training.evaluation import evaluate
from distil_tl.training.network import Network
from distil_tl.training.precision import Compute
from tests.helpers.staging import ALONE


class Noting(Network):
    """Logits of 3 classes that depend on the image alone. Notes the sizes of the batches that it gets."""

    def __init__(self, *, is_compiled: bool) -> None:
        super().__init__(Compute(None, channels_last=False))
        self.is_compiled = is_compiled
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        means = images.double().flatten(1).mean(dim=1) / 100
        return torch.stack([means.sin(), means.cos(), 1 - means], dim=1).float()


def batches(*sizes: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.randint(0, 256, (size, 3, 4, 4), dtype=torch.uint8, generator=generator)
        targets = torch.randint(0, 3, (size,), generator=generator)
        yield Batch(images, targets, torch.arange(size), torch.ones(size, dtype=torch.bool), [])


def test_a_compiled_network_gets_batches_of_one_size() -> None:
    networks = [Noting(is_compiled=is_compiled) for is_compiled in (False, True)]
    found = [evaluate(ALONE, network, 3, batches(8, 8, 3), 3, mistakes=20) for network in networks]
    assert [network.sizes for network in networks] == [[8, 8, 3], [8, 8, 8]]
    assert [result.metrics.count for result in found] == [19, 19]
    assert found[0].metrics.compute() == pytest.approx(found[1].metrics.compute())
    assert found[0].mistakes == found[1].mistakes
    assert len(found[0].mistakes) > 0
