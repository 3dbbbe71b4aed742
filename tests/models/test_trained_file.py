"""A trained classifier from a file of weights: its head, classes, size and normalisation, and what is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distil_tl.models.config import ModelConfig
from distil_tl.models.trained_file import TrainedFile, load_trained_file
from distil_tl.models.transfer import build
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import SMALLEST

CLASSES = ["circles", "noise", "stripes"]
KEY = "stages.full.distill"
TORCHVISION = "shufflenet_v2_x0_5"


def weights(name: str = SMALLEST, classes: int = 3) -> dict[str, Tensor]:
    return build(ModelConfig(name, "none"), classes, image_size=32, seed=1).module.state_dict()


def load(path: Path, name: str | None = SMALLEST, size: int | None = 32) -> TrainedFile:
    return load_trained_file(path, name, size, CLASSES, KEY)


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("wrap", ["", "state_dict"])
@pytest.mark.parametrize(("name", "suffix"), [(SMALLEST, ".pth"), (TORCHVISION, ".safetensors")])
def test_all_weights_are_loaded_with_those_of_the_head(tmp_path: Path, name: str, suffix: str, wrap: str) -> None:
    state = weights(name)
    content = {"state_dict": state, "epoch": 3} if wrap and suffix == ".pth" else state
    found = load(saved(tmp_path / f"x{suffix}", content), name, None)
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.model.module.state_dict().items())
    assert found.classes == CLASSES
    assert found.image_size == found.model.preprocess.crop_size


def test_names_of_modules_in_front_are_left_out(tmp_path: Path) -> None:
    state = weights()
    path = saved(tmp_path / "x.pth", OrderedDict((f"module.{key}", value) for key, value in state.items()))
    found = load(path).model.module.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())


@pytest.mark.parametrize(
    "beside", [{"classes": ["noise", "stripes", "circles"]}, {"class_to_idx": {"circles": 2, "noise": 0, "stripes": 1}}]
)
def test_a_file_may_name_its_classes(tmp_path: Path, beside: dict[str, Any]) -> None:
    assert load(saved(tmp_path / "x.pth", {"model": weights(), **beside})).classes == ["noise", "stripes", "circles"]
    save_file(weights(), tmp_path / "x.safetensors", {key: json.dumps(value) for key, value in beside.items()})
    assert load(tmp_path / "x.safetensors").classes == ["noise", "stripes", "circles"]


def library_folder(path: Path, **changes: Any) -> Path:
    """As `timm.models.save_for_hf` writes it."""
    path.mkdir()
    save_file(weights(), path / "model.safetensors")
    published = {"input_size": [3, 48, 48], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.25], "crop_pct": 1.0}
    content = {"architecture": "test_resnet", "num_classes": 3, "label_names": CLASSES[::-1]}
    (path / "config.json").write_text(json.dumps({**content, "pretrained_cfg": published, **changes}))
    return path


def test_a_folder_of_a_library_says_everything(tmp_path: Path) -> None:
    folder = library_folder(tmp_path / "model")
    for path in (folder, folder / "model.safetensors"):
        found = load(path, None, None)
        assert (found.model.name, found.image_size, found.classes) == (SMALLEST, 48, CLASSES[::-1])
        assert found.model.preprocess.mean == (0.1, 0.2, 0.3)
        assert found.model.preprocess.std == (0.5, 0.5, 0.25)
    assert load(folder, SMALLEST, 64).image_size == 64


REFUSED: dict[str, tuple[Any, str]] = {
    "another head": (lambda: weights(classes=5), "has 5 outputs, and there are 3 classes"),
    "a backbone": (
        lambda: {key: value for key, value in weights().items() if not key.startswith("fc.")},
        "has no classifier (fc)",
    ),
    "another network": (lambda: weights(TORCHVISION), f"or set {KEY}.model to the architecture"),
    "no weights": (lambda: {"epoch": 3}, "contains no state dict"),
    "objects": (lambda: {"state_dict": weights(), "args": Path("x")}, "could run code"),
    "numbers": (lambda: {"state_dict": weights(), "classes": [1, 2, 3]}, "must be a list of the names"),
    "a class twice": (lambda: {"state_dict": weights(), "classes": ["a", "b", "a"]}, "has 'a' twice"),
    "positions": (lambda: {"state_dict": weights(), "class_to_idx": {"a": 1, "b": 2}}, "does not count"),
    "two classes": (lambda: {"state_dict": weights(), "classes": ["a", "b"]}, "3 outputs, and there are 2 classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_the_own_keys(tmp_path: Path, case: str) -> None:
    content, said = REFUSED[case]
    path = saved(tmp_path / "x.pth", content())
    with pytest.raises(UserError) as refused:
        load(path)
    assert said in str(refused.value)
    assert f"{KEY}.teacher" in str(refused.value)
    assert "model.weights" not in str(refused.value)


def test_sizes_and_networks_that_do_not_exist(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", weights("timm/test_vit"))
    with pytest.raises(UserError, match=rf"^{KEY}.image_size=50 does not fit timm/test_vit"):
        load(path, "timm/test_vit", 50)
    with pytest.raises(UserError, match=rf"^{KEY}.model: timm has no model 'test_vitt', did you mean"):
        load(path, "timm/test_vitt")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"label_names": "circles"}, "label_names must be a list"),
    "size": ({"pretrained_cfg": {"input_size": [3, 48, 32]}}, "is not the size of square images"),
    "mean": ({"pretrained_cfg": {"mean": [0.5]}}, "mean must be three numbers"),
    "std": ({"pretrained_cfg": {"std": [1, 0, 1]}}, "std must be three numbers above 0"),
    "option": ({"model_args": {"global_pool": "max"}}, "sets global_pool='max' for timm/test_resnet"),
    "network": ({"architecture": "test_vit"}, f"is of timm/test_vit: remove {KEY}.model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_description_is_refused(tmp_path: Path, case: str) -> None:
    changes, said = WRONG[case]
    folder = library_folder(tmp_path / "model", **changes)
    with pytest.raises(UserError) as refused:
        load(folder)
    assert said in str(refused.value)


def test_a_description_of_another_kind_does_not_count(tmp_path: Path) -> None:
    folder = library_folder(tmp_path / "model", architecture=None, model_type="vit")
    assert load(folder).classes == CLASSES
    with pytest.raises(UserError, match=f"names no network: set {KEY}.model"):
        load(folder, None)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load(folder)


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.fc(self.stem(images).mean((2, 3)))

def build(num_classes):
    return Net(num_classes)

build.preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "image_size": 40}
"""


def test_a_network_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_teacher.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    state = weights("own_teacher:build")
    found = load(saved(tmp_path / "x.pth", state), "own_teacher:build", None)
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.model.module.state_dict().items())
    assert (found.image_size, found.model.preprocess.mean) == (40, (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="has 4 outputs, and there are 3 classes"):
        load(saved(tmp_path / "y.pth", weights("own_teacher:build", 4)), "own_teacher:build", None)
