"""Modern families of networks, each as a small one with random weights: groups, head, cuts, a step, preprocessing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from distil_tl.models import torchvision_models
from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.frozen_prefix import cut_frozen_prefix
from distil_tl.models.transfer import TransferModel, build, default_preprocess
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage, trainable_groups
from tests.helpers.networks import random_model

SMALL = "tests.helpers.small_networks:"
FAMILIES = {  # the smallest of each family, or a network of its class with few narrow layers; with an image size
    SMALL + "alexnet": 64,
    SMALL + "vgg_bn": 32,
    "resnet18": 32,
    SMALL + "resnext": 32,
    SMALL + "wide_resnet": 32,
    "densenet121": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "squeezenet1_1": 32,
    "shufflenet_v2_x0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "mnasnet0_5": 32,
    "efficientnet_b0": 32,
    SMALL + "efficientnet_v2": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    SMALL + "convnext": 32,
    SMALL + "vit": 32,
    SMALL + "swin": 32,
    SMALL + "swin_v2": 32,
    SMALL + "maxvit": 64,
    SMALL + "dinov2": 28,
    "timm/vit_tiny_patch16_dinov3_qkvb": 32,
    SMALL + "siglip": 32,
    "timm/eva02_tiny_patch14_224": 28,
    "timm/convnextv2_atto": 32,
    "timm/mobilenetv4_conv_small": 32,
    "timm/efficientvit_b0": 32,
    "timm/efficientvit_m0": 32,
    SMALL + "hiera": 64,
    SMALL + "caformer": 32,
    "timm/ghostnet_050": 32,
    "timm/deit_tiny_distilled_patch16_224": 32,  # with two heads
    SMALL + "tnt": 32,  # its trained part uses several values of the frozen part
}


@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_a_family_is_cut_and_trained_like_any_other(name: str, size: int) -> None:
    if name.startswith("timm/") or name.partition(":")[2] in ("dinov2", "siglip", "hiera", "caformer", "tnt"):
        pytest.importorskip("timm")
    model = random_model(name, size=size)
    model.module.double()  # rounding then hides nothing
    names = list(model.group_names)
    assert len(names) >= 4
    assert names[-1] == "head"
    assert all(len(model.module.get_submodule(path).weight) == 3 for path in model.heads)  # type: ignore[arg-type]
    images = torch.randn(2, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    order = order_of_groups(model, images)
    assert order == sorted(order), [names[group] for group in order]
    assert set(order) == set(range(len(names)))
    for trained in {1, len(names) // 2}:
        apply_stage(model, StageConfig(unfreeze=trained))
        cut = cut_frozen_prefix(model.module, images)
        features = cut.prefix(images)
        expected, found = step(model, model.module, images), step(model, cut.suffix, features.clone())
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            scale = max(float(value.abs().max()), 1e-9)
            assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-6 * scale), key
        groups = trainable_groups(trained, names)
        assert {model.parameter_groups[key] for key in found if key != "logits"} == groups


def step(model: TransferModel, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradients by name, of one step of training."""
    model.module.zero_grad()
    torch.manual_seed(0)  # of dropout
    logits = forward(inputs)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
    gradients = {key: p.grad.clone() for key, p in model.module.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def order_of_groups(model: TransferModel, images: Tensor) -> list[int]:
    """The layer groups in the order in which a forward pass begins with their layers."""
    ran: dict[int | None, None] = {}

    def note(group: int | None) -> Callable[..., None]:
        return lambda *_: ran.setdefault(group)

    handles = [
        part.register_forward_pre_hook(note(model.group_of(path)))
        for path, part in model.module.named_modules()
        if next(part.parameters(), None) is not None and not list(part.children())
    ]
    with torch.no_grad():
        model.module(images)
    for handle in handles:
        handle.remove()
    return [group for group in ran if group is not None]


def test_preprocessing_of_torchvision_is_that_of_the_weights() -> None:
    for name in torchvision_models.names():
        for weights in torchvision.models.get_model_weights(name):
            preset = weights.transforms()
            found = default_preprocess(ModelConfig(name, weights.name))
            assert (found.mean, found.std) == (tuple(preset.mean), tuple(preset.std))
            assert ([found.crop_size], [found.resize_size]) == (preset.crop_size, preset.resize_size)
            assert found.interpolation == preset.interpolation.value


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in FAMILIES if name.startswith("timm/")),
        "timm/vit_small_patch14_dinov2",
        "timm/hiera_tiny_224",
        "timm/caformer_s18",
        "timm/vit_base_patch32_siglip_256",
        "timm/vit_base_patch16_siglip_224.v2_webli",
        "timm/convnext_tiny.dinov3_lvd1689m",
        "timm/vit_small_patch16_dinov3.lvd1689m",
    ],
)
def test_preprocessing_is_that_of_the_weights(name: str) -> None:
    timm = pytest.importorskip("timm")
    published = timm.models.get_pretrained_cfg(name.removeprefix("timm/"))
    found = default_preprocess(ModelConfig(name, "none"))
    assert (found.mean, found.std) == (published.mean, published.std)
    assert (found.crop_size, found.interpolation) == (published.input_size[-1], published.interpolation)
    assert found.resize_size == int(published.input_size[-1] / published.crop_pct)


def test_regnet_is_built_without_memory() -> None:
    with torch.device("meta"):
        model = build(ModelConfig("regnet_y_400mf", "none"), 3, image_size=None, seed=0)
    assert model.module.get_parameter("fc.weight").device.type == "meta"
    assert model.group_names == ("stem", "block1", "block2", "block3", "block4", "head")
    (problem,) = ModelConfig("regnet_y_400mf", "none", dropout=0.1).problems()
    assert "has no option for dropout" in problem
