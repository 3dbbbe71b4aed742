"""Graphs of a network's code: conditions on values, and modules that are not traced into."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from distil_tl.models.graph.trace import (
    MAX_CONDITIONS,
    FrozenBlockTracer,
    LayerTracer,
    UniformBlockTracer,
    UnknownConditionError,
    graph_up_to,
    trace,
)


def images(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


class NegatesLarge(nn.Module):
    """Branches on the size of its images, a number of times."""

    def __init__(self, conditions: int = 1) -> None:
        super().__init__()
        self.conditions = conditions

    def forward(self, maps: Tensor) -> Tensor:
        for _ in range(self.conditions):
            maps = -maps if maps.shape[-1] > 8 else maps
        return maps


@pytest.mark.parametrize(("size", "sign"), [(8, 1), (9, -1)])
def test_the_outcome_of_a_condition_is_that_of_the_example_images(size: int, sign: int) -> None:
    graph = trace(LayerTracer, NegatesLarge(), images(size))
    assert torch.equal(fx.GraphModule(nn.Module(), graph)(images(16)), sign * images(16))


def test_the_number_of_conditions_is_limited() -> None:
    traced = fx.GraphModule(nn.Module(), trace(LayerTracer, NegatesLarge(MAX_CONDITIONS), images(9)))
    assert torch.equal(traced(images(9)), images(9)), "an even number of changes of the sign"
    with pytest.raises(UnknownConditionError):
        trace(LayerTracer, NegatesLarge(MAX_CONDITIONS + 1), images(9))


class Untraceable(nn.Module):
    """Converts a value to a Python number, which fails with a proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, maps: Tensor) -> Tensor:
        result: Tensor = self.layer(maps) * float(maps.mean())
        return result


def calls(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_which_blocks_are_traced_into() -> None:
    """Three blocks of two layers: all frozen, all trained, and one layer of each."""
    network = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)) for _ in range(3)))
    network[0].requires_grad_(False)
    network[2].get_submodule("0").requires_grad_(False)
    assert calls(trace(LayerTracer, network, images())) == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert calls(trace(FrozenBlockTracer, network, images())) == ["0", "1.0", "1.1", "2.0", "2.1"]
    assert calls(trace(UniformBlockTracer, network, images())) == ["0", "1", "2.0", "2.1"]


def test_the_code_of_a_frozen_block_may_do_anything() -> None:
    network = nn.Sequential(Untraceable().requires_grad_(False), nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError):
        trace(LayerTracer, network, images())
    assert calls(trace(FrozenBlockTracer, network, images())) == ["0", "1"]


def test_a_graph_up_to_a_node_computes_this_node() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    graph = trace(LayerTracer, network, images())
    relu = next(node for node in graph.nodes if node.target == "1")
    part = fx.GraphModule(network, graph_up_to(graph, relu))
    assert torch.equal(part(images()), network[:2](images()))
    assert calls(part.graph) == ["0", "1"]
