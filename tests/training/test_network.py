"""Image networks with folded BatchNorm: the same logits and gradients, in float32 and for one image size only."""

from __future__ import annotations

import torch
from torch import Tensor

from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.network import ImageNetwork, lay_out, set_layout, try_to_fold
from distil_tl.training.precision import Compute
from tests.helpers.networks import gradients, random_model

CPU = torch.device("cpu")


def image_network(model: TransferModel, dtype: torch.dtype | None = None) -> ImageNetwork:
    network = ImageNetwork(model, Compute(dtype, True), CPU)
    lay_out(network)
    return network


def folded_network(model: TransferModel, dtype: torch.dtype | None = None, *, trains: bool = False) -> ImageNetwork:
    set_layout(model.module, Compute(dtype, True))
    network = ImageNetwork(model, Compute(dtype, True), CPU, try_to_fold(model, 64, CPU, trains=trains), 64)
    lay_out(network)
    return network


def pixels(size: int = 64) -> Tensor:
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_a_network_without_norms_is_not_folded() -> None:
    model = build(ModelConfig("squeezenet1_1", weights="none"), 3, image_size=64, seed=0)
    assert folded_network(model).folded is None


def test_a_folded_network_lists_each_parameter_once_under_its_first_name() -> None:
    model = random_model("resnet18", "all")
    network = image_network(model).eval()
    with torch.no_grad():
        wanted = network(pixels())
        network = folded_network(model, trains=True).eval()
        found = network(pixels())
        assert not torch.equal(found, wanted), "BatchNorm is folded"
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(network(pixels(96)), image_network(model).eval()(pixels(96))), "not folded for another size"
    assert [name for name, _ in network.named_parameters()] == [
        f"module.{name}" for name, _ in model.module.named_parameters()
    ]


def test_in_bfloat16_norms_are_not_folded() -> None:
    model = random_model("resnet18", "all")
    network = folded_network(model, torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(network(pixels()), image_network(model, torch.bfloat16).eval()(pixels()))
        network = ImageNetwork(model, Compute(None, True), CPU, network.folded, 64).eval()
        lay_out(network)
        assert not torch.equal(network(pixels()), image_network(model).eval()(pixels()))


def test_a_folded_network_compiles() -> None:
    model = random_model("mobilenet_v3_small", "all")
    network = folded_network(model, trains=True)
    wanted = gradients(network, model, pixels())
    network.compile(dynamic=False, backend="aot_eager")
    found = gradients(network, model, pixels())
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-2 * gradient.norm(), key
