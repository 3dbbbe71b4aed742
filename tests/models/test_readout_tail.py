"""Read-outs of networks that pool in a function or have two heads, compared with what hooks see in plain ones."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import distil_tl
from distil_tl.export.to_onnx import describe, to_onnx
from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.frozen_prefix import cut_frozen_prefix
from distil_tl.models.names import READOUTS
from distil_tl.models.preprocess import Normalize
from distil_tl.models.transfer import TransferModel, build
from distil_tl.selection.plan import _networks
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import WITHOUT_TIMM, small_args
from tests.helpers.ranks import train
from tests.helpers.runs import summary_of

SMALL = "tests.helpers.small_networks:"
TINY = SMALL + "pooled_in_function"


def model_with(name: str, readout: str, size: int) -> TransferModel:
    """A network with random weights, and statistics of BatchNorm that change its inputs."""
    model = build(ModelConfig(name, "none", readout=readout), 3, image_size=size, seed=0)
    generator = torch.Generator().manual_seed(1)
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return model


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: TransferModel, paths: list[str], size: int) -> list[Tensor]:
    """What layers give for the images; of a head, what it gets at its last call."""
    seen: dict[str, Tensor] = {}
    for path in paths:

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, path: str = path) -> None:
            seen[path] = args[0] if path in model.heads else output.clone()

        model.module.get_submodule(path).register_forward_hook(note)
    model.module.eval()(images(size))
    return [seen[path].flatten(1) if path in model.heads else seen[path] for path in paths]


def average(maps: Tensor) -> Tensor:
    return maps.mean(1) if maps.ndim == 3 else maps.mean((2, 3))


def maximum(maps: Tensor) -> Tensor:
    return maps.amax(1) if maps.ndim == 3 else maps.amax((2, 3))


# By name: the size of the images, the last layers or blocks of the last three stages, and of each head the layers
# between the pooling and it; "relu" is a function before the pooling.
MAPS: dict[str, tuple[int, tuple[str, str, str], list[list[str]]]] = {
    TINY: (32, ("stages.0", "stages.1", "stages.2"), [["relu", "norm"]]),
    "mobilenet_v2": (64, ("features.6", "features.13", "features"), [[]]),
    "mnasnet0_5": (64, ("layers.9", "layers.11", "layers"), [[]]),
    "shufflenet_v2_x0_5": (64, ("stage2", "stage3", "conv5"), [[]]),
    "densenet121": (64, ("features.denseblock2", "features.denseblock3", "features.norm5"), [["relu"]]),
    SMALL + "hiera": (64, ("blocks.1", "blocks.3", "blocks.4"), [["head.norm"]]),
    "timm/levit_128s": (96, ("stages.0", "stages.1", "stages.2"), [["head.bn"], ["head_dist.bn"]]),
    "timm/repvit_m0_9": (64, ("stages.1", "stages.2", "stages.3"), [["head.head.bn"], ["head.head_dist.bn"]]),
}


@pytest.mark.parametrize("name", MAPS)
def test_maxima_and_averages_of_earlier_stages(name: str) -> None:
    size, stages, after = MAPS[name]
    plain = model_with(name, "pooled", size)
    third, second, last, *pooled = outputs(plain, [*stages, *plain.heads], size)
    both, three = model_with(name, "avg_max", size), model_with(name, "last3", size)
    assert list(both.module.state_dict()) == list(three.module.state_dict()) == list(plain.module.state_dict())
    two = outputs(model_with(name, "last2", size), list(plain.heads), size)
    found = zip(
        pooled, outputs(both, [*both.heads], size), outputs(three, [*three.heads], size), two, after, strict=True
    )
    for own, with_maximum, of_three, of_two, layers in found:
        torch.testing.assert_close(of_three, torch.cat([average(third), average(second), own], 1))
        torch.testing.assert_close(of_two, torch.cat([average(second), own], 1))
        largest = maximum(last)
        for layer in layers:
            largest = largest.relu() if layer == "relu" else plain.module.get_submodule(layer)(largest)
        assert name.startswith("timm/levit") or not torch.allclose(largest, own)  # its new weights give equal tokens
        torch.testing.assert_close(with_maximum, torch.cat([own, largest], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "ends"),
    [(SMALL + "vgg_bn", 32, ("features.14", "features.18")), (SMALL + "alexnet", 64, ("features.4", "features.11"))],
)
def test_a_network_with_hidden_layers_has_earlier_stages_alone(name: str, size: int, ends: tuple[str, str]) -> None:
    plain = model_with(name, "pooled", size)
    third, second, own = outputs(plain, [*ends, *plain.heads], size)
    (found,) = outputs(model_with(name, "last3", size), list(plain.heads), size)
    torch.testing.assert_close(found, torch.cat([average(third), average(second), own], 1))


# By name: the size, the norm whose tokens each head reads, the token of each, tokens before the patches, the blocks.
TOKENS: dict[str, tuple[int, list[str], list[int], int, str]] = {
    "timm/xcit_nano_12_p8_224": (32, ["norm"], [0], 1, ""),
    "timm/deit_tiny_distilled_patch16_224": (32, ["norm", "norm"], [0, 1], 2, "blocks"),
    "timm/crossvit_tiny_240": (240, ["norm.0", "norm.1"], [0, 0], 1, ""),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_the_code_of_a_network_pools(name: str) -> None:
    pytest.importorskip("timm")
    size, norms, places, first, blocks = TOKENS[name]
    plain = model_with(name, "pooled", size)
    tokens = outputs(plain, norms, size)
    pairs = [(each[:, place], each[:, first:].mean(1)) for each, place in zip(tokens, places, strict=True)]
    for readout in ("token", "mean", "token_mean"):
        model = model_with(name, readout, size)
        assert list(model.module.state_dict()) == list(plain.module.state_dict())
        for found, (token, mean) in zip(outputs(model, list(model.heads), size), pairs, strict=True):
            expected = {"token": token, "mean": mean, "token_mean": torch.cat([token, mean], 1)}[readout]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if blocks:
        count = len(plain.module.get_submodule(blocks))  # type: ignore[arg-type]
        of_blocks = outputs(plain, [f"{blocks}.{count - n}" for n in (4, 3, 2, 1)], size)
        norm = plain.module.get_submodule(norms[0])
        model = model_with(name, "last4", size)
        for found, place, (_, mean) in zip(outputs(model, list(model.heads), size), places, pairs, strict=True):
            expected = torch.cat([*(norm(each)[:, place] for each in of_blocks), mean], 1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "readouts"),
    [(TINY, ("last3", "avg_max", "pooled")), ("timm/xcit_nano_12_p8_224", ("mean", "pooled"))],
)
def test_read_outs_side_by_side_are_those_of_networks_with_one(name: str, readouts: tuple[str, ...]) -> None:
    model = build(ModelConfig(name, "none"), 3, image_size=32, seed=0, readouts=readouts)
    (found,) = outputs(model, [*model.heads], 32)
    for readout, (first, end) in model.columns.items():
        (alone,) = outputs(
            build(ModelConfig(name, "none", readout=readout), 3, image_size=32, seed=0), [*model.heads], 32
        )
        torch.testing.assert_close(found[:, first:end], alone)


@pytest.mark.parametrize(
    ("name", "readout"),
    [(TINY, "avg_max"), ("mobilenet_v2", "last3"), ("timm/deit_tiny_distilled_patch16_224", "last4")],
)
def test_a_network_is_cut_copied_and_trained(name: str, readout: str) -> None:
    model = model_with(name, readout, 32)
    module = model.module.double()
    inputs = images(32).double()
    for trained in (1, len(model.groups) // 2):
        apply_stage(model, StageConfig(unfreeze=trained))
        cut = cut_frozen_prefix(module, inputs)
        gradients = []
        for forward in (module, lambda images, cut=cut: cut.suffix(cut.prefix(images))):
            module.zero_grad()
            torch.manual_seed(0)  # of dropout
            forward(inputs).square().sum().backward()  # type: ignore[no-untyped-call]
            gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
        if trained == 1 and len(model.heads) == 1:  # else no heads are searched on the features
            assert isinstance(cut.suffix, nn.Sequential)
            assert isinstance(cut.suffix[-1], nn.Linear)
    other = copy.deepcopy(module).eval()
    torch.testing.assert_close(other(inputs), module.eval()(inputs))


def test_a_token_that_is_not_the_first_is_no_class_token() -> None:
    first, plain = (model_with(SMALL + "first_token", readout, 32) for readout in ("mean", "pooled"))
    (tokens,) = outputs(plain, ["mix"], 32)
    torch.testing.assert_close(outputs(first, ["fc"], 32)[0], tokens[:, 1:].mean(1))
    with pytest.raises(UserError, match="its code has no tokens that can be read out"):
        model_with(SMALL + "last_token", "mean", 32)


@pytest.mark.parametrize("kind", ["mlp", "cosine"])
def test_a_head_of_another_kind_gets_the_same(kind: str) -> None:
    model = build(ModelConfig(TINY, "none", readout="avg_max"), 3, image_size=32, seed=0, head_kind=kind)
    linear = build(ModelConfig(TINY, "none", readout="avg_max"), 3, image_size=32, seed=0)
    (found,), (expected,) = outputs(model, ["fc"], 32), outputs(linear, ["fc"], 32)
    torch.testing.assert_close(found, expected)
    assert cut_frozen_prefix(apply_head_stage(model), images(32)).prefix(images(32)).shape == expected.shape


def apply_head_stage(model: TransferModel) -> nn.Module:
    apply_stage(model, StageConfig(unfreeze="head"))
    return model.module


def test_passes_in_two_threads_do_not_mix() -> None:
    module = model_with(TINY, "last3", 32).module.eval()
    inputs = [images(32), images(32).flip(0)]
    expected = [module(each).detach() for each in inputs]
    started = threading.Barrier(2)
    module.get_submodule("norm").register_forward_pre_hook(lambda *_: [started.wait(60)][1:] or None)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(module, inputs))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("readout", ["avg_max", "last3"])
def test_onnx_gives_the_same(tmp_path: Path, readout: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_with(TINY, readout, 32)
    metadata = describe(model.preprocess, 32, ["a", "b", "c"], {}, intensity="dtype", extensions=[])
    session = onnxruntime.InferenceSession(to_onnx(model, 32, metadata))
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    (found,) = session.run(None, {"images": pixels.numpy()})
    with torch.no_grad():
        expected = model.module.eval()(Normalize(model.preprocess)(pixels)).softmax(1)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_selection_of_all_read_outs_has_them() -> None:
    with torch.device("meta"):
        found, reasons = _networks(ModelConfig("mobilenet_v2", "none"), 64, READOUTS, 3, {})
    assert list(found) == ["pooled", "avg_max", "last2", "last3"]
    assert list(reasons) == [" token", " mean", " token_mean", " last4"]


def test_a_run_uses_features_and_is_loaded(tmp_path: Path, folder: Path) -> None:
    args = [*small_args(folder), WITHOUT_TIMM, f"run_dir={tmp_path / 'run'}", "model.readout=avg_max"]
    assert train([*args, "stages.head.augment=none", "stages.full.epochs=1"]) == 0
    assert summary_of(tmp_path / "run")["stages"]["head"]["cached"]
    head = distil_tl.load(tmp_path / "run").model.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    assert head.in_features == 2048
