"""model.drop_path and model.dropout: the options of the libraries, and the graphs of networks that have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.fold_batchnorm import ConvNorm, fold_batchnorm
from distil_tl.models.graph.frozen_prefix import cut_frozen_prefix
from tests.helpers.arguments import SMALLEST
from tests.helpers.networks import random_model


def shares(module: nn.Module) -> list[float]:
    """Of each active stochastic depth, in order."""
    found = [getattr(part, "drop_prob", getattr(part, "p", 0.0)) for part in module.modules() if is_depth(part)]
    return [share for share in found if share > 0]


def is_depth(part: nn.Module) -> bool:
    return type(part).__name__ in ("DropPath", "StochasticDepth")


@pytest.mark.parametrize("name", [SMALLEST, "efficientnet_b0"])
def test_stochastic_depth_is_that_of_the_library(name: str) -> None:
    found = shares(random_model(name, "all", 32, drop_path=0.1).module)
    assert found == sorted(found), "it grows with the depth, as in Huang et al. (2016)"
    assert 0.05 < max(found) < 0.101
    assert shares(random_model(name, "all", 32, drop_path=0.0).module) == []


def test_null_is_what_the_library_does() -> None:
    assert max(shares(random_model("efficientnet_b0", "all", 32).module)) > 0.18
    assert shares(random_model(SMALLEST, "all", 32).module) == []
    assert random_model("mobilenet_v2", "all", 32).module.classifier[0].p == 0.2  # type: ignore[index,union-attr]
    assert random_model("mobilenet_v2", "all", 32, dropout=0.4).module.classifier[0].p == 0.4  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("mobilenet_v2", "drop_path", 0.1, "model.drop_path: torchvision has no option for stochastic depth of mob"),
        ("swin_t", "drop_path", 0.1, "no option for stochastic depth of swin_t; remove model.drop_path"),
        ("resnet18", "dropout", 0.1, "model.dropout: torchvision has no option for dropout before its head of re"),
        ("timm/vgg11", "drop_path", 0.1, "model.drop_path: timm has no option for stochastic depth of vgg11"),
        ("resnet18", "dropout", 1.0, "model.dropout must be a share of at least 0 and below 1, or null"),
    ],
)  # fmt: skip
def test_a_model_without_it_is_refused(name: str, key: str, value: float, message: str) -> None:
    given: dict[str, Any] = {key: value}
    (problem,) = ModelConfig(name, "none", **given).problems()
    assert message in problem
    assert ModelConfig("efficientnet_b0", "none", drop_path=0.3, dropout=0.1).problems() == []


def test_a_frozen_part_drops_nothing_and_the_head_on_its_features_does() -> None:
    """timm's Lite0 calls dropout as a function: in the graph it is a layer, which follows the mode of the network."""
    model, images = random_model("timm/tf_efficientnet_lite0", drop_path=0.5, dropout=0.5), torch.randn(3, 3, 64, 64)
    assert shares(model.module)
    cut = cut_frozen_prefix(model.module, images)
    assert [type(part) for part in cut.suffix.children()] == [nn.Dropout, nn.Linear], "a search of heads needs this"

    def logits(network: nn.Module, given: Tensor) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            found: Tensor = network(given)
        return found

    with torch.no_grad():
        features = cut.prefix(images)
    assert torch.equal(features, logits(cut.prefix, images))
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}
    dropped = logits(cut.suffix, features)
    torch.testing.assert_close(dropped, logits(model.module, images), **close)
    model.module.eval(), cut.suffix.eval()
    whole = logits(cut.suffix, features)
    torch.testing.assert_close(whole, logits(model.module, images), **close)
    assert not torch.allclose(dropped, whole)


def test_batch_norm_is_folded_in_a_network_that_drops() -> None:
    model, images = random_model(SMALLEST, "all", drop_path=0.3, dropout=0.3), torch.randn(3, 3, 64, 64)
    folded = fold_batchnorm(model.module, images, trains=True)  # compares both in both modes
    assert any(isinstance(part, ConvNorm) for part in folded.modules())
    torch.manual_seed(0)
    first = folded(images)
    assert not torch.equal(first, folded(images))
    folded.eval()
    assert torch.equal(folded(images), folded(images))
