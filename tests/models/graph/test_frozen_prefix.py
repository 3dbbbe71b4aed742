"""A network cut in two computes the same as the whole, for every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from distil_tl.models.graph.frozen_prefix import CannotCutError, CutNetwork, cut_frozen_prefix
from distil_tl.models.transfer import TransferModel
from tests.helpers.networks import random_model


def cut_of(model: TransferModel, size: int = 64) -> CutNetwork:
    return cut_frozen_prefix(model.module, torch.randn(3, 3, size, size))


def test_an_identity_after_a_linear_head_is_left_out() -> None:
    suffix = cut_of(random_model("timm/regnety_002")).suffix
    assert isinstance(suffix, nn.Sequential)
    assert isinstance(suffix[-1], nn.Linear)


@pytest.mark.parametrize("unfreeze", ["head", 2])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("mobilenet_v2", 64),
        ("mobilenet_v3_small", 64),
        ("squeezenet1_1", 64),
        ("densenet121", 64),
        ("vit_b_16", 64),
        ("swin_t", 64),
        ("timm/tf_efficientnet_lite0", 64),
        ("timm/vit_tiny_patch16_224", 224),  # its code branches on the number of patches
        ("timm/deit_tiny_distilled_patch16_224", 224),  # with two heads
    ],
)
def test_the_parts_compute_the_same_as_the_whole(name: str, size: int, unfreeze: object) -> None:
    model = random_model(name, unfreeze, size)
    cut = cut_of(model, size)
    model.module.eval()
    cut.suffix.eval()
    images = torch.randn(5, 3, size, size)
    with torch.no_grad():
        features = cut.prefix(images)
        torch.testing.assert_close(cut.suffix(features.clone()), model.module(images), rtol=1e-3, atol=1e-5)
    trained = {id(p) for p in model.module.parameters() if p.requires_grad}
    assert {id(p) for p in cut.suffix.parameters() if p.requires_grad} == trained
    assert not any(p.requires_grad for p in cut.prefix.parameters())


def test_gradients_are_those_of_the_whole() -> None:
    model = random_model("resnet18", 2)
    cut = cut_of(model)
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(model.module(images), targets).backward()  # type: ignore[no-untyped-call]
    whole = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    F.cross_entropy(cut.suffix(cut.prefix(images)), targets).backward()  # type: ignore[no-untyped-call]
    assert len(whole) == len([p for p in model.module.parameters() if p.requires_grad])
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "timm/tf_efficientnet_lite0", "timm/resnet18"])
def test_every_frozen_batch_norm_is_folded(name: str) -> None:
    model = random_model(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    cut = cut_of(model)
    assert not [part for part in cut.prefix.modules() if isinstance(part, nn.BatchNorm2d)]
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, before[key]), "the network itself is not changed"


def test_cutting_changes_no_statistics_and_no_random_numbers() -> None:
    model = random_model("shufflenet_v2_x0_5", 2, batch_norm="train")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    modes = [part.training for part in model.module.modules()]
    images = torch.randn(3, 3, 64, 64)
    state = torch.get_rng_state()
    cut = cut_frozen_prefix(model.module, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.module.modules()] == modes
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    moving = [m for m in cut.suffix.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    assert moving, "they are in the trained part"


class Small(nn.Module):
    """Two layers, and an operation between them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), how
        self.dropout = nn.Dropout(0.5)
        self.first.requires_grad_(False)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.first(images).mean((2, 3))
        if self.how == "images later":
            return self.last(found) + images.mean()  # type: ignore[no-any-return]
        if self.how == "dropout":
            found = self.dropout(found)
        elif self.how == "functional dropout":
            found = F.dropout(found, 0.5, self.training)
        elif self.how == "random":
            found = found + torch.rand_like(found)
        elif self.how == "state":
            self.calls += 1
            found = found + self.calls
        elif self.how == "value" and float(found.sum()) > 0:
            found = -found
        elif self.how == "other code" and isinstance(found, fx.Proxy):
            found = found.reshape(7, 7)
        elif self.how == "two":
            return self.last(found), found  # type: ignore[return-value]
        return self.last(found)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("images later", "its trained part uses the images directly"),
        ("random", "its frozen part gives different results in two calls"),
        ("state", "its two parts give other results than the whole network"),
        ("value", "its code can't be traced (TypeError)"),
        ("other code", "its parts can't be run (RuntimeError)"),
        ("two", "its output is not one tensor of logits"),
    ],
)
def test_a_network_that_cannot_be_cut(how: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CannotCutError) as caught:
        cut_frozen_prefix(Small(how), torch.randn(3, 3, 8, 8))
    assert str(caught.value) == reason
    assert capfd.readouterr() == ("", ""), "torch.fx prints no traceback"


@pytest.mark.parametrize("how", ["dropout", "functional dropout"])
def test_random_layers_are_in_the_suffix(how: str) -> None:
    cut = cut_frozen_prefix(Small(how), torch.randn(3, 3, 8, 8))
    assert any(isinstance(part, nn.Dropout) for part in cut.suffix.modules())
    assert isinstance(cut.suffix, nn.Sequential)


def test_nothing_frozen_and_nothing_trained() -> None:
    with pytest.raises(CannotCutError, match="^its trained part uses the images directly$"):
        cut_frozen_prefix(random_model("resnet18", "all").module, torch.randn(3, 3, 64, 64))
    frozen = Small("dropout").eval().requires_grad_(False)
    with pytest.raises(CannotCutError, match="^nothing in it is trained$"):
        cut_frozen_prefix(frozen, torch.randn(3, 3, 8, 8))
