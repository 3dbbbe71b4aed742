"""Modern families of networks, each as a small one with random weights: groups, head, cuts, a step, preprocessing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.frozen_prefix import cut_frozen_prefix
from distil_tl.models.transfer import build, default_preprocess
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage, trainable_groups
from tests.helpers.networks import random_model

FAMILIES = {  # with a small image size
    "timm/vit_small_patch14_dinov2": 56,
    "timm/vit_tiny_patch16_dinov3_qkvb": 64,
    "timm/vit_base_patch32_siglip_256": 64,
    "timm/eva02_tiny_patch14_224": 56,
    "timm/convnextv2_atto": 64,
    "timm/mobilenetv4_hybrid_medium_075": 64,
    "timm/efficientvit_b0": 64,
    "timm/efficientvit_m0": 128,
    "timm/hiera_tiny_224": 64,
    "timm/caformer_s18": 64,
    "timm/ghostnet_050": 64,
}


@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_a_family_is_cut_and_trained_like_any_other(name: str, size: int) -> None:
    pytest.importorskip("timm")
    model = random_model(name, size=size)
    names = list(model.group_names)
    assert len(names) >= 4
    assert names[-1] == "head"
    assert all(len(model.module.get_submodule(path).weight) == 3 for path in model.heads)  # type: ignore[arg-type]
    images, targets = torch.randn(3, 3, size, size), torch.tensor([0, 1, 2])
    trained = len(names) // 2
    apply_stage(model, StageConfig(unfreeze=trained))
    cut = cut_frozen_prefix(model.module, images)
    features = cut.prefix(images)
    model.module.eval()
    cut.suffix.eval()
    with torch.no_grad():
        logits = model.module(images)
        largest = float(logits.abs().max())
        torch.testing.assert_close(cut.suffix(features.clone()), logits, rtol=1e-3, atol=1e-4 * largest)
    apply_stage(model, StageConfig(unfreeze=trained))
    F.cross_entropy(cut.suffix(features), targets).backward()  # type: ignore[no-untyped-call]
    groups = trainable_groups(trained, names)
    for key, parameter in model.module.named_parameters():
        assert (parameter.grad is not None) == (model.parameter_groups[key] in groups), key


@pytest.mark.parametrize(
    "name",
    [
        *FAMILIES,
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
