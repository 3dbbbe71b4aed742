"""Read-outs: what the head gets is what their names say, for each family, and the layers stay those of the network."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import distil_tl
from distil_tl.cli.export import main as export
from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.frozen_prefix import cut_frozen_prefix
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import SMALLEST, small_args
from tests.helpers.ranks import run_ranks, train
from tests.helpers.runs import summary_of


def model_with(name: str, readout: str, size: int = 64) -> TransferModel:
    return build(ModelConfig(name, "none", readout=readout), 3, image_size=size, seed=0)


def head_inputs(model: TransferModel, images: Tensor) -> Tensor:
    """What the head gets."""
    seen: list[Tensor] = []
    handle = model.module.get_submodule(model.heads[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.module.eval()(images)
    handle.remove()
    return seen[0]


def images(size: int = 64) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["timm/test_resnet", "timm/test_convnext", "timm/mobilenetv3_small_050", "convnext_tiny"]
)
def test_average_and_max_are_one_after_the_other(name: str) -> None:
    pooled, both = model_with(name, "pooled"), model_with(name, "avg_max")
    assert list(both.module.state_dict()) == list(pooled.module.state_dict())
    average, found = head_inputs(pooled, images()).flatten(1), head_inputs(both, images()).flatten(1)
    assert found.shape[1] == 2 * average.shape[1]
    torch.testing.assert_close(found[:, : average.shape[1]], average)
    assert not torch.allclose(found[:, average.shape[1] :], average)


@pytest.mark.parametrize(("name", "size"), [("timm/test_vit", 160), ("vit_b_32", 64)])
def test_tokens_are_read_out(name: str, size: int) -> None:
    pooled, token, mean, both = (
        head_inputs(model_with(name, readout, size), images(size))
        for readout in ("pooled", "token", "mean", "token_mean")
    )
    torch.testing.assert_close(token, pooled)
    assert not torch.allclose(mean, token)
    torch.testing.assert_close(both, torch.cat([token, mean], 1))


# The last blocks with feature maps of twice and four times the resolution of the last ones.
STAGES = {
    "resnet18": ("layer3", "layer2"),
    "mobilenet_v3_small": ("features.8", "features.3"),
    "timm/tf_efficientnet_lite0": ("blocks.4", "blocks.2"),
    "timm/mobilenetv3_small_050": ("blocks.3", "blocks.1"),
    "timm/convnext_atto": ("stages.2", "stages.1"),
    "swin_t": ("features.5", "features.3"),  # channels come last
}


@pytest.mark.parametrize("name", STAGES)
def test_averages_of_earlier_stages_are_before_the_pooled_output(name: str) -> None:
    model = model_with(name, "last3")
    assert list(model.module.state_dict()) == list(model_with(name, "pooled").module.state_dict())
    maps: list[Tensor] = []
    for path in STAGES[name][::-1]:
        layer = model.module.get_submodule(path)
        layer.register_forward_hook(
            lambda _, __, output: maps.append(
                output.flatten(1, 2).mean(1) if name == "swin_t" else output.flatten(2).mean(2)
            )
        )
    found = head_inputs(model, images()).flatten(1)
    pooled = head_inputs(model_with(name, "pooled"), images()).flatten(1)
    torch.testing.assert_close(found, torch.cat([*maps, pooled], 1))
    two = head_inputs(model_with(name, "last2"), images()).flatten(1)
    assert torch.equal(two, found[:, maps[0].shape[1] :])


@pytest.mark.parametrize(("name", "size"), [("timm/vit_tiny_patch16_224", 64), ("vit_b_32", 32)])
def test_class_tokens_of_four_blocks_and_the_mean_of_the_patches(name: str, size: int) -> None:
    """As in DINOv2's evaluation: each through the norm after the last block."""
    model = model_with(name, "last4", size)
    if name == "vit_b_32":
        plain = model_with(name, "pooled", size).module.eval()
        blocks, norm = plain.get_submodule("encoder.layers"), plain.get_submodule("encoder.ln")
        tokens: list[Tensor] = []
        for block in list(blocks.children())[-4:]:
            block.register_forward_hook(lambda _, __, output: tokens.append(norm(output)))
        with torch.no_grad():
            plain(images(size))
        expected = [each[:, 0] for each in tokens] + [tokens[-1][:, 1:].mean(1)]
    else:
        plain = model_with(name, "pooled", size).module.eval()
        with torch.no_grad():
            layers = plain.get_intermediate_layers(images(size), n=4, norm=True, return_prefix_tokens=True)  # type: ignore[operator]
        expected = [prefix[:, 0] for _, prefix in layers] + [layers[-1][0].mean(1)]
    torch.testing.assert_close(head_inputs(model, images(size)), torch.cat(expected, 1))


@pytest.mark.parametrize(
    ("name", "size", "readouts"),
    [
        ("timm/test_efficientnet", 64, ("pooled", "avg_max", "last2", "last3")),
        ("timm/convnext_atto", 64, ("last3", "avg_max")),
        ("timm/test_vit", 160, ("pooled", "token", "mean", "token_mean", "last4")),
        ("timm/eva02_tiny_patch14_224", 224, ("token", "pooled")),
        ("timm/test_vit3", 160, ("pooled", "mean")),  # pools by attention
    ],
)
def test_read_outs_side_by_side_are_those_of_networks_with_one(name: str, size: int, readouts: tuple[str, ...]) -> None:
    model = build(ModelConfig(name, "none"), 3, image_size=size, seed=0, readouts=readouts)
    assert list(model.columns) == list(readouts)
    found = head_inputs(model, images(size)).flatten(1)
    assert {0, found.shape[1]} <= {column for pair in model.columns.values() for column in pair}
    for readout, (first, end) in model.columns.items():
        assert torch.equal(found[:, first:end], head_inputs(model_with(name, readout, size), images(size)).flatten(1))


def test_passes_in_two_threads_do_not_mix() -> None:
    module = model_with("timm/test_resnet", "last2").module.eval()
    inputs = [images(), images().flip(0)]
    expected = [module(each).detach() for each in inputs]
    started = threading.Barrier(2)
    module.get_submodule("layer4").register_forward_pre_hook(lambda *_: [started.wait(60)][1:] or None)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(module, inputs))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "readout"),
    [
        ("timm/test_convnext", "avg_max"), ("timm/test_vit", "token_mean"), ("timm/test_vit", "last4"),
        ("timm/test_efficientnet", "last3"), ("resnet18", "last2"),
    ],
)  # fmt: skip
def test_a_network_with_a_readout_is_cut_copied_and_trained(name: str, readout: str) -> None:
    model = model_with(name, readout, 160)
    apply_stage(model, StageConfig(unfreeze="head"))
    cut = cut_frozen_prefix(model.module, images(160))
    features = cut.prefix(images(160))
    torch.testing.assert_close(features.flatten(1), head_inputs(model, images(160)).flatten(1), rtol=1e-3, atol=1e-4)
    other = copy.deepcopy(model.module).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(images(160)), model.module.eval()(images(160)))
    cut.suffix(features).sum().backward()
    assert isinstance(head := model.module.get_submodule(model.heads[0]), nn.Linear)
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    ("name", "readout", "reason"),
    [
        ("timm/test_vit", "avg_max", "no layer of it averages feature maps"),
        ("resnet18", "mean", "its code has no tokens that can be read out; use pooled, avg_max, last2 or last3"),
        ("alexnet", "avg_max", "no layer of it averages feature maps; use pooled, last2 or last3"),
        ("squeezenet1_1", "avg_max", "its head comes before its pooling; use pooled$"),
        ("timm/vit_base_patch32_siglip_256", "token", "it has no class token; use pooled or mean"),
        ("timm/test_vit", "last2", "no layer of it averages feature maps"),
        ("timm/test_vit2", "last4", "it has no class token"),
        ("timm/xcit_nano_12_p8_224", "last4", "it has no 4 blocks with class tokens; use pooled, token, mean or"),
        ("timm/test_efficientnet", "last4", "its code has no tokens"),
        ("timm/resmlp_12_224", "last2", "it has no 2 stages of feature maps"),
    ],
)
def test_a_readout_that_a_network_has_not_is_refused(name: str, readout: str, reason: str) -> None:
    message = f"model.readout={readout}: not possible with {name}, as {reason}"
    with pytest.raises(UserError, match=message), torch.device("meta"):
        model_with(name, readout)


def test_a_refusal_names_the_read_outs_of_a_network_that_is_built_with_values() -> None:
    with pytest.raises(UserError, match="no tokens that can be read out; use pooled, avg_max, last2 or last3$"):
        model_with("shufflenet_v2_x0_5", "token")


def test_an_unknown_readout_is_refused() -> None:
    (problem,) = ModelConfig("resnet18", "none", readout="max").problems()
    assert problem == "model.readout=max: use one of pooled, avg_max, last2, last3, token, mean, token_mean, last4"


def test_a_run_with_a_readout_is_loaded_and_exported(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    args = [*small_args(folder), f"run_dir={tmp_path / 'run'}", "model.readout=last3", "stages.head.augment=none"]
    assert train([*args, "stages.full.epochs=0"]) == 0
    assert run_ranks(2, train, [*args, "stages.full.epochs=1"]) == [0, 0], "resumed with another stage, under DDP"
    assert summary_of(tmp_path / "run")["stages"]["head"]["cached"]
    model = distil_tl.load(tmp_path / "run").model
    assert isinstance(head := model.get_submodule("fc"), nn.Linear)
    pooled = build(ModelConfig(SMALLEST, "none"), 3, image_size=32, seed=0).module.get_submodule("fc")
    assert head.in_features > pooled.in_features  # type: ignore[operator]
    assert export([str(tmp_path / "run"), "-o", str(tmp_path / "model.onnx")]) == 0, "it was compared on val"
    capsys.readouterr()
    assert export([str(tmp_path / "run"), "--format", "safetensors", "-o", str(tmp_path / "library")]) == 2
    assert "no argument of timm builds timm/test_resnet with model.readout=last3" in capsys.readouterr().err
    assert train([*args, "stages.full.epochs=1", "model.readout=pooled"]) == 2
    assert "model.readout: was 'last3', now 'pooled'" in capsys.readouterr().err
