"""A network in two parts does what the whole does, whatever the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.frozen_prefix import CannotCutError, CutNetwork, cut_frozen_prefix
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage


def built(name: str, unfreeze: object = "head", size: int = 64, batch_norm: str = "frozen") -> TransferModel:
    model = build(ModelConfig(name, weights="none"), 3, image_size=size, seed=0)
    with torch.no_grad():
        for part in model.module.modules():
            if isinstance(part, nn.BatchNorm2d):  # or folding would have nothing to fold
                part.running_mean.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    apply_stage(model, StageConfig(unfreeze=unfreeze, batch_norm=batch_norm))
    return model


def parts_of(model: TransferModel, size: int = 64) -> CutNetwork:
    return cut_frozen_prefix(model.module, torch.randn(3, 3, size, size))


def test_a_linear_head_is_one_though_a_layer_that_does_nothing_is_behind_it() -> None:
    suffix = parts_of(built("timm/regnety_002")).suffix
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
        ("vit_b_16", 224),
        ("swin_t", 64),
        ("timm/tf_efficientnet_lite0", 64),
        ("timm/vit_tiny_patch16_224", 224),  # whose code asks how many patches there are
        ("timm/deit_tiny_distilled_patch16_224", 224),  # with two heads
    ],
)
def test_the_parts_do_what_the_whole_does(name: str, size: int, unfreeze: object) -> None:
    model = built(name, unfreeze, size)
    parts = parts_of(model, size)
    model.module.eval()
    parts.suffix.eval()
    images = torch.randn(5, 3, size, size)
    with torch.no_grad():
        features = parts.prefix(images)
        torch.testing.assert_close(parts.suffix(features.clone()), model.module(images), rtol=1e-3, atol=1e-5)
    trained = {id(p) for p in model.module.parameters() if p.requires_grad}
    assert {id(p) for p in parts.suffix.parameters() if p.requires_grad} == trained
    assert not any(p.requires_grad for p in parts.prefix.parameters())


def test_gradients_are_those_of_the_whole() -> None:
    model = built("resnet18", 2)
    parts = parts_of(model)
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(model.module(images), targets).backward()  # type: ignore[no-untyped-call]
    whole = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    F.cross_entropy(parts.suffix(parts.prefix(images)), targets).backward()  # type: ignore[no-untyped-call]
    assert len(whole) == len([p for p in model.module.parameters() if p.requires_grad])
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "timm/tf_efficientnet_lite0", "timm/resnet18"])
def test_every_frozen_batch_norm_is_folded(name: str) -> None:
    model = built(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    parts = parts_of(model)
    assert not [part for part in parts.prefix.modules() if isinstance(part, nn.BatchNorm2d)]
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, before[key]), "the network itself stays as it is"


def test_moving_statistics_and_random_numbers_stay() -> None:
    model = built("shufflenet_v2_x0_5", 2, batch_norm="train")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    modes = [part.training for part in model.module.modules()]
    images = torch.randn(3, 3, 64, 64)
    state = torch.get_rng_state()
    parts = cut_frozen_prefix(model.module, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.module.modules()] == modes
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    moving = [m for m in parts.suffix.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    assert moving, "they are on the side that is trained"


class Small(nn.Module):
    """Two layers, and something between them."""

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
        elif self.how == "two":
            return self.last(found), found  # type: ignore[return-value]
        return self.last(found)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("images later", "what it trains takes the images themselves"),
        ("functional dropout", "its two parts don't give what the whole does"),  # as `training` is settled by then
        ("random", "its frozen part does not give the same twice"),
        ("state", "its two parts don't give what the whole does"),
        ("value", "its code can't be followed (TypeError)"),
        ("two", "its output is not one tensor of logits"),
    ],
)
def test_what_can_not_be_cut(how: str, reason: str) -> None:
    with pytest.raises(CannotCutError) as caught:
        cut_frozen_prefix(Small(how), torch.randn(3, 3, 8, 8))
    assert str(caught.value) == reason


def test_nothing_random_is_cut_off() -> None:
    parts = cut_frozen_prefix(Small("dropout"), torch.randn(3, 3, 8, 8))
    assert any(isinstance(part, nn.Dropout) for part in parts.suffix.modules())
    assert isinstance(parts.suffix, nn.Sequential)


def test_where_nothing_is_frozen_or_trained() -> None:
    with pytest.raises(CannotCutError, match="^what it trains takes the images themselves$"):
        cut_frozen_prefix(built("resnet18", "all").module, torch.randn(3, 3, 64, 64))
    frozen = Small("dropout").eval().requires_grad_(False)
    with pytest.raises(CannotCutError, match="^nothing in it is trained$"):
        cut_frozen_prefix(frozen, torch.randn(3, 3, 8, 8))
