"""Comparing a rewritten network with the original one, without side effects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distil_tl.models.graph.equivalence import NotEquivalentError, check_equivalent, preserve_state


def network() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2))


def images() -> Tensor:
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_modes_statistics_and_random_numbers_are_restored_after_an_error() -> None:
    module = network()
    module[2].eval()  # type: ignore[index]
    modes = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()

    def train_and_fail() -> None:
        with preserve_state(module, torch.device("cpu")):
            module.train()(images())
            assert not torch.equal(module.state_dict()["0.running_mean"], before["0.running_mean"])
            raise MemoryError

    with pytest.raises(MemoryError):
        train_and_fail()
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_rounding_is_accepted_in_both_modes() -> None:
    module = network()
    check_equivalent(lambda x: module(x) * (1 + 1e-6), module, images(), called="the copies")


@pytest.mark.parametrize("mode", [True, False])
def test_a_difference_in_one_mode_is_an_error(mode: bool) -> None:
    module = network()

    def rewritten(x: Tensor) -> Tensor:
        logits: Tensor = module(x)
        return logits * (1.01 if module.training is mode else 1)

    with pytest.raises(NotEquivalentError, match="^the copies give other results than the whole network$"):
        check_equivalent(rewritten, module, images(), called="the copies")
    check_equivalent(rewritten, module, images(), called="the copies", modes=[not mode])


def test_nan_is_a_difference() -> None:
    module = network()
    with pytest.raises(NotEquivalentError, match="give other results"):
        check_equivalent(lambda x: module(x) * float("nan"), module, images(), called="the copies")


def test_another_shape_is_a_difference() -> None:
    module = network()
    with pytest.raises(NotEquivalentError, match="not one tensor of logits"):
        check_equivalent(lambda x: module(x)[:, :1], module, images(), called="the copies")
