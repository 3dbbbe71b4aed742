"""BatchNorm folded into convolutions as they train: the same function, gradients and statistics as without."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.fold_batchnorm import CannotFoldError, ConvNorm, fold_batchnorm
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.network import ImageNetwork, set_layout, try_to_fold
from distil_tl.training.precision import Compute
from tests.models.test_frozen_prefix import built, parts_of

TARGETS = torch.tensor([0, 1, 2, 0])


def images(size: int = 64) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))


def folded(module: nn.Module, of: Tensor) -> nn.Module:
    return fold_batchnorm(module, of, trains=True)


def reason_not_to_fold(module: nn.Module, of: Tensor, *, trains: bool = True) -> str:
    with pytest.raises(CannotFoldError) as caught:
        fold_batchnorm(module, of, trains=trains)
    return str(caught.value)


def gradients(network: Callable[[Tensor], Tensor], model: TransferModel, of: Tensor) -> dict[str, Tensor]:
    model.module.zero_grad()
    torch.manual_seed(0)  # of dropout
    F.cross_entropy(network(of), TARGETS).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def joined(network: nn.Module) -> int:
    return sum(isinstance(part, ConvNorm) for part in network.modules())


def norms(network: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        "efficientnet_b0",
        "vgg11_bn",  # whose convolutions have a bias
        "timm/tf_efficientnet_lite0",  # which pads by itself, and whose norms hold the activation
        "timm/resnet18",
    ],
)
def test_the_same_logits_and_gradients(name: str) -> None:
    model = built(name, "all")
    model.module.double()  # or rounding would make some of the decisions that ReLU and pooling take
    network, of = folded(model.module, images().double()), images().double()
    assert joined(network) == norms(model.module) > 0
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
    assert joined(network) == 1
    torch.testing.assert_close(network(images(8)), module(images(8)))


def test_statistics_that_move_move_as_without_and_are_folded_in_evaluation() -> None:
    model = built("mobilenet_v2", "all", batch_norm="train")
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
    assert len(calls) == norms(model.module), "each was called once, by the network as it was"


def test_weights_that_are_loaded_later_are_used() -> None:
    model = built("resnet18", "all")
    network = folded(model.module, images()).eval()
    other = built("resnet18", "all")
    with torch.no_grad():
        for value in other.module.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.1)
    model.module.load_state_dict(other.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(images()), other.module.eval()(images()), rtol=1e-3, atol=1e-4)


def test_the_network_itself_stays_as_it_is() -> None:
    model = built("mobilenet_v2", "all")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    modes = [part.training for part in model.module.modules()]
    assert folded(model.module, images()) is not model.module
    assert [part.training for part in model.module.modules()] == modes
    assert joined(model.module) == 0
    assert {k: torch.equal(v, before[k]) for k, v in model.module.state_dict().items()} == dict.fromkeys(before, True)


def test_what_is_trained_after_a_frozen_part_is_folded_too() -> None:
    model = built("resnet18", 2)
    parts = parts_of(model)
    assert joined(parts.prefix) == 0
    assert joined(parts.suffix) == norms(parts.suffix) == 5


class Small(nn.Module):
    """A convolution and a norm, and what else is done with them."""

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
        elif self.how == "the code asks":
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
        "the code asks",
        "nothing",
    ],
)
def test_only_what_is_alone_after_a_convolution_is_folded(how: str) -> None:
    module = Small(how)
    if how == "nothing":
        network = folded(module, images(8))
        assert joined(network) == 1
        torch.testing.assert_close(network(images(8)), module(images(8)))
    elif how == "the code asks":
        assert reason_not_to_fold(module, images(8)) == "its code can't be followed (TypeError)"
    else:
        assert reason_not_to_fold(module, images(8)) == "no convolution of it has a BatchNorm alone behind it"


class Standardised(nn.Conv2d):
    """Its weight is scaled by itself, so that another scale is lost on it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight / self.weight.norm(), self.bias)


def test_what_would_be_another_function_is_left_alone() -> None:
    module = Small("nothing")
    module.conv = Standardised(3, 3, 1)  # and its BatchNorm, which is new, changes nothing yet
    assert reason_not_to_fold(module, images(8)) == "no convolution of it has a BatchNorm alone behind it"


def test_what_is_no_number_proves_nothing() -> None:
    module = Small("nothing")
    nn.init.constant_(module.last.bias, float("nan"))
    reason = reason_not_to_fold(module, images(8), trains=False)
    assert reason == "its layers, folded, don't give what the whole does"


def test_a_trial_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built("resnet18", "all", batch_norm="train").module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ConvNorm, "forward", fails)
    assert reason_not_to_fold(module, images()) == "its code can't be followed (MemoryError)"
    assert [part.training for part in module.modules()] == modes
    assert {k: torch.equal(v, before[k]) for k, v in module.state_dict().items()} == dict.fromkeys(before, True)


def test_for_evaluation_only_that_is_tried() -> None:
    module = Small("nothing").train()
    module.last = nn.Sequential(module.last, OtherInTraining())  # type: ignore[assignment]
    assert joined(fold_batchnorm(module, images(8), trains=False)) == 1
    assert reason_not_to_fold(module, images(8)) == "its layers, folded, don't give what the whole does"


class OtherInTraining(nn.Module):
    """What torch.fx sees of it, once and for all, is what it does in evaluation or in training."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Identity()

    def forward(self, logits: Tensor) -> Tensor:
        below: Tensor = self.below(logits)
        return below * 2 if self.training else below


CPU = torch.device("cpu")


def image_network(model: TransferModel, dtype: torch.dtype | None = None) -> ImageNetwork:
    return ImageNetwork(model, Compute(dtype, True), CPU)


def folded_network(model: TransferModel, dtype: torch.dtype | None = None, *, trains: bool = False) -> ImageNetwork:
    set_layout(model.module, Compute(dtype, True))
    return ImageNetwork(model, Compute(dtype, True), CPU, try_to_fold(model, 64, CPU, trains=trains), 64)


def drawn(size: int = 64) -> Tensor:
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_a_network_without_norms_is_left_alone() -> None:
    model = build(ModelConfig("squeezenet1_1", weights="none"), 3, image_size=64, seed=0)
    assert folded_network(model).folded is None


def test_an_image_network_folds_and_names_no_parameter_twice() -> None:
    model = built("resnet18", "all")
    network = image_network(model).eval()
    with torch.no_grad():
        wanted = network(drawn())
        network = folded_network(model, trains=True).eval()
        found = network(drawn())
        assert not torch.equal(found, wanted), "something was folded"
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(network(drawn(96)), image_network(model).eval()(drawn(96))), "of another size nothing is"
    assert [name for name, _ in network.named_parameters()] == [
        f"module.{name}" for name, _ in model.module.named_parameters()
    ]


def test_in_bfloat16_nothing_is_folded() -> None:
    model = built("resnet18", "all")
    network = folded_network(model, torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(network(drawn()), image_network(model, torch.bfloat16).eval()(drawn()))
        network = ImageNetwork(model, Compute(None, True), CPU, network.folded, 64).eval()
        assert not torch.equal(network(drawn()), image_network(model).eval()(drawn()))


def test_it_compiles() -> None:
    model = built("mobilenet_v3_small", "all")
    network = folded_network(model, trains=True)
    wanted = gradients(network, model, drawn())
    network.compile(dynamic=False, backend="aot_eager")
    found = gradients(network, model, drawn())
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-2 * gradient.norm(), key
