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


def test_mistakes_and_uncertain_images_have_their_predictions() -> None:
    """Against all images sorted one by one."""
    network, given = Noting(is_compiled=False), list(batches(8, 8, 3))
    for number, batch in enumerate(given):
        batch.indices.add_(8 * number)
    given[1].valid[2] = False
    found = evaluate(ALONE, network, 3, iter(given), 3, mistakes=4)
    everything = []
    for batch in given:
        for image, target, index, valid in zip(
            batch.images, batch.targets.tolist(), batch.indices.tolist(), batch.valid, strict=True
        ):
            p = network(image[None]).softmax(dim=1)[0]
            top = p.sort(descending=True, stable=True)
            if valid:
                everything.append((index, target, p.tolist(), top.values.tolist(), top.indices.tolist()))
    wrong = sorted((e for e in everything if e[4][0] != e[1]), key=lambda e: (-e[3][0], e[0]))
    close = sorted(everything, key=lambda e: (e[3][0] - e[3][1], e[0]))
    assert len(wrong) > 4
    for kept, expected in ((found.mistakes, wrong[:4]), (found.uncertain, close[:4])):
        assert [(k.image, k.target) for k in kept] == [(e[0], e[1]) for e in expected]
        for k, e in zip(kept, expected, strict=True):
            assert k.target_probability == pytest.approx(e[2][e[1]])
            assert [name for name, _ in k.top] == e[4]
            assert [p for _, p in k.top] == pytest.approx(e[3])


def test_a_single_class_has_no_uncertain_images() -> None:
    class One(Noting):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, :1]

    (batch,) = batches(5)
    found = evaluate(ALONE, One(is_compiled=False), 1, iter([batch._replace(targets=batch.targets * 0)]), 1, mistakes=4)
    assert (found.mistakes, found.uncertain) == ([], [])
