"""BatchNorm folded into trained convolutions: the same function, gradients and statistics as unfolded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distil_tl.models.graph.fold_batchnorm import CannotFoldError, ConvNorm, fold_batchnorm
from distil_tl.models.graph.frozen_prefix import cut_frozen_prefix
from tests.helpers.networks import gradients, random_model


def images(size: int = 64) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))


def folded(module: nn.Module, of: Tensor) -> nn.Module:
    return fold_batchnorm(module, of, trains=True)


def reason_not_to_fold(module: nn.Module, of: Tensor, *, trains: bool = True) -> str:
    with pytest.raises(CannotFoldError) as caught:
        fold_batchnorm(module, of, trains=trains)
    return str(caught.value)


def count_folded(network: nn.Module) -> int:
    return sum(isinstance(part, ConvNorm) for part in network.modules())


def count_norms(network: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        "efficientnet_b0",
        "vgg11_bn",  # its convolutions have a bias
        "timm/tf_efficientnet_lite0",  # pads in its convolutions; its norms contain the activation
        "timm/resnet18",
    ],
)
def test_the_same_logits_and_gradients(name: str) -> None:
    model = random_model(name, "all")
    if name == "vgg11_bn":  # without most of its linear layers, which have 120 million parameters
        model.module.classifier = nn.Linear(512 * 7 * 7, 3)
    model.module.double()  # in float32, rounding would change the outcome of some ReLUs and poolings
    network, of = folded(model.module, images().double()), images().double()
    assert count_folded(network) == count_norms(model.module) > 0
    wanted, found = gradients(model.module, model, of), gradients(network, model, of)
    assert found.keys() == wanted.keys() == dict(model.module.named_parameters()).keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-8 * gradient.norm(), key
    model.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(of), model.module(of))


def test_a_network_whose_norms_have_no_scale_and_shift() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.LazyLinear(2)).eval()
    module[1].running_mean.normal_()  # type: ignore[operator]
    module(images(8))
    network = folded(module, images(8))
    assert count_folded(network) == 1
    torch.testing.assert_close(network(images(8)), module(images(8)))


def test_trained_statistics_are_the_same_and_are_folded_in_evaluation() -> None:
    model = random_model("mobilenet_v2", "all", batch_norm="train")
    other = copy.deepcopy(model)
    network = folded(model.module, images())
    found, wanted = gradients(network, model, images()), gradients(other.module, other, images())
    for key, gradient in wanted.items():
        assert torch.equal(found[key], gradient), key
    for key, value in other.module.state_dict().items():
        assert torch.equal(model.module.state_dict()[key], value), key
    assert not torch.equal(model.module.state_dict()["features.0.1.running_mean"], torch.zeros(32))
    model.module.eval()
    calls: list[nn.Module] = []
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        torch.testing.assert_close(network(images()), model.module(images()), rtol=1e-3, atol=1e-4)
    assert len(calls) == count_norms(model.module), "each was called once, by the original network"


def test_weights_that_are_loaded_later_are_used() -> None:
    model = random_model("resnet18", "all")
    network = folded(model.module, images()).eval()
    other = random_model("resnet18", "all")
    with torch.no_grad():
        for value in other.module.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.1)
    model.module.load_state_dict(other.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(images()), other.module.eval()(images()), rtol=1e-3, atol=1e-4)


def test_the_network_itself_is_not_changed() -> None:
    model = random_model("mobilenet_v2", "all")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    modes = [part.training for part in model.module.modules()]
    assert folded(model.module, images()) is not model.module
    assert [part.training for part in model.module.modules()] == modes
    assert count_folded(model.module) == 0
    assert {k: torch.equal(v, before[k]) for k, v in model.module.state_dict().items()} == dict.fromkeys(before, True)


def test_the_trained_part_after_a_frozen_part_is_folded_too() -> None:
    model = random_model("resnet18", 2)
    parts = cut_frozen_prefix(model.module, images())
    assert count_folded(parts.prefix) == 0
    assert count_folded(parts.suffix) == count_norms(parts.suffix) == 5


class Small(nn.Module):
    """A convolution and a norm, and other uses of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.last, self.how = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2), how
        self.norm.eval()
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        found = self.conv(maps)
        if self.how == "the convolution's own result is used":
            found = self.norm(found) + found
        elif self.how == "the convolution is used twice":
            found = self.norm(self.conv(found))
        elif self.how == "the norm is used twice":
            found = self.norm(self.norm(found))
        elif self.how == "something between":
            found = self.norm(found.relu())
        elif self.how == "the code branches on a value":
            found = self.norm(found) if float(found.sum()) > 0 else found
        else:
            found = self.norm(found)
        result: Tensor = self.last(found.mean((2, 3)))
        return result


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize(
    "how",
    [
        "the convolution's own result is used",
        "the convolution is used twice",
        "the norm is used twice",
        "something between",
        "the code branches on a value",
        "nothing",
    ],
)
def test_only_a_norm_that_is_alone_after_a_convolution_is_folded(how: str) -> None:
    module = Small(how)
    if how == "nothing":
        network = folded(module, images(8))
        assert count_folded(network) == 1
        torch.testing.assert_close(network(images(8)), module(images(8)))
    elif how == "the code branches on a value":
        assert reason_not_to_fold(module, images(8)) == "its code can't be traced (TypeError)"
    else:
        assert reason_not_to_fold(module, images(8)) == "no convolution is followed by a BatchNorm only"


class Standardised(nn.Conv2d):
    """Its weight is normalised, so another scale of it changes nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight / self.weight.norm(), self.bias)


def test_weight_standardisation_is_not_folded() -> None:
    module = Small("nothing")
    module.conv = Standardised(3, 3, 1)  # its BatchNorm still scales by 1: comparing outputs would not detect it
    assert reason_not_to_fold(module, images(8)) == "no convolution is followed by a BatchNorm only"


def test_nan_is_not_accepted_as_equal() -> None:
    module = Small("nothing")
    nn.init.constant_(module.last.bias, float("nan"))
    reason = reason_not_to_fold(module, images(8), trains=False)
    assert reason == "its folded layers give other results than the whole network"


def test_the_network_is_not_changed_by_an_error_in_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    module = random_model("resnet18", "all", batch_norm="train").module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ConvNorm, "forward", fails)
    assert reason_not_to_fold(module, images()) == "its code can't be traced (MemoryError)"
    assert [part.training for part in module.modules()] == modes
    assert {k: torch.equal(v, before[k]) for k, v in module.state_dict().items()} == dict.fromkeys(before, True)


def test_for_evaluation_only_this_mode_is_compared() -> None:
    module = Small("nothing").train()
    module.last = nn.Sequential(module.last, DiffersInTraining())  # type: ignore[assignment]
    assert count_folded(fold_batchnorm(module, images(8), trains=False)) == 1
    assert reason_not_to_fold(module, images(8)) == "its folded layers give other results than the whole network"


class DiffersInTraining(nn.Module):
    """torch.fx traces it in one mode, and the graph does the same in both."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Identity()

    def forward(self, logits: Tensor) -> Tensor:
        below: Tensor = self.below(logits)
        return below * 2 if self.training else below
