"""One's own network as model.name=MODULE:FUNCTION: head, groups, preprocessing, clear errors, and a whole run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distil_tl
from distil_tl.cli.export import main as export
from distil_tl.cli.predict import main as predict
from distil_tl.models.config import ModelConfig
from distil_tl.models.own_models import source_digest
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.transfer import TransferModel, build
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import small_args
from tests.helpers.ranks import train
from tests.helpers.runs import summary_of

CODE = """
import torch
from torch import nn
import torchvision

class Net(nn.Module):
    def __init__(self, num_classes=10, outputs="logits"):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, 2), nn.ReLU())
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(6, num_classes)
        self.outputs = outputs

    def forward(self, images):
        found = self.fc(self.drop(self.body(self.stem(images)).mean((2, 3))))
        return {"logits": found} if self.outputs == "dict" else found

def build(num_classes):
    return Net(num_classes)

build.preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "image_size": 32, "crop_pct": 1.0}

def features():
    return Net()

def named(num_classes):
    net = Net(num_classes)
    net.layer_groups = {"below": ["stem", "body.0"], "head": "fc"}
    return net

def named_wrong(num_classes):
    net = Net(num_classes)
    net.layer_groups = {"below": ["stem"]}
    return net

def resnet():
    return torchvision.models.resnet18()

def sized(num_classes, image_size, *, pretrained=False):
    net = Net(num_classes)
    if pretrained:
        nn.init.constant_(net.stem[0].weight, 0.25)
    net.image_size = image_size
    return net

def dictionary(num_classes):
    return Net(num_classes, outputs="dict")

def other_head(num_classes):
    return Net(num_classes + 1)

def nothing(num_classes):
    return None

def fails(num_classes):
    raise ValueError("no such width")

def exits(num_classes):
    raise SystemExit(0)

def needs(num_classes, width):
    return Net(num_classes)

def no_layer(num_classes):
    return nn.Sequential(nn.BatchNorm2d(3))

def preprocessed(num_classes):
    return Net(num_classes)

preprocessed.preprocess = {"mean": 0.5}
limit = 3
"""


@pytest.fixture(autouse=True)
def folder_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_pkg").mkdir()
    (tmp_path / "own_pkg" / "nets.py").write_text(CODE)
    (tmp_path / "own_pkg" / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "own_pkg" / "raising.py").write_text("\n1 / 0\n")
    (tmp_path / "own_pkg" / "exiting.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_pkg"]:
        del sys.modules[name]


def own(function: str, weights: str = "none", size: int | None = None, classes: int = 5) -> TransferModel:
    return build(ModelConfig(f"own_pkg.nets:{function}", weights), classes, image_size=size, seed=0)


def test_it_is_called_with_the_number_of_classes_and_has_a_group_for_each_child() -> None:
    model = own("build")
    assert model.group_names == ("stem", "body", "head")
    assert model.heads == ("fc",)
    assert model.module(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert model.module.get_parameter("fc.weight").std() < 0.02, "the head is initialised as every head"
    assert (model.image_size, model.fixed_image_size) == (32, False)
    assert model.preprocess == Preprocess((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_size=32, resize_size=32)


def test_without_an_argument_for_classes_its_last_layer_is_replaced() -> None:
    model = own("features")
    assert model.module(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert model.preprocess == Preprocess()


def test_a_network_of_torchvision_has_the_groups_of_its_family() -> None:
    with torch.device("meta"):
        model = own("resnet")
    assert model.group_names == ("stem", "layer1", "layer2", "layer3", "layer4", "head")


def test_a_network_names_its_groups() -> None:
    assert own("named").group_names == ("below", "head")


def test_its_image_size_and_whether_its_weights_are_wanted() -> None:
    model = own("sized", "default", 48)
    assert model.fixed_image_size
    assert model.module.image_size == 48
    assert bool((model.module.get_parameter("stem.0.weight") == 0.25).all())
    assert model.weights.source == "those of own_pkg.nets:sized"
    assert not (own("sized", "none").module.get_parameter("stem.0.weight") == 0.25).any()


def test_random_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    one = own("build")
    torch.manual_seed(2)
    other = own("build")
    for key, value in one.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("own_pkg.nets:biuld", ["own_pkg.nets has no biuld", "`build`"]),
        ("own_pkg.nets:limit", ["limit is a int, not a function"]),
        ("own_pkg.nets:", ["write MODULE:FUNCTION"]),
        ("own_pkg.gone:build", ["there is no module own_pkg.gone", "PYTHONPATH"]),
        ("gone.nets:build", ["there is no module gone ", "PYTHONPATH"]),
        ("own_pkg.broken:build", ["imports no_such_library, which is not installed"]),
        ("own_pkg.raising:build", ["ZeroDivisionError", "raising.py:2"]),
        ("own_pkg.exiting:build", ["importing own_pkg.exiting failed (SystemExit", "exiting.py:1"]),
        ("own_pkg.nets:needs", ["arguments without a default: width"]),
        ("own_pkg.nets:preprocessed", ["mean and std are three numbers"]),
    ],
)
def test_a_wrong_name_is_found_before_anything_is_built(name: str, parts: list[str]) -> None:
    (problem,) = ModelConfig(name, "none").problems()
    assert problem.startswith(f"model.name={name}: ")
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    ("function", "part"),
    [
        ("dictionary", "its output in evaluation is a dict; it must be logits [2, 5]"),
        ("other_head", "its last layer fc has 6 outputs; name the classifier in layer_groups"),
        ("nothing", "returned a NoneType, not a torch.nn.Module"),
        ("fails", "ValueError: no such width, "),
        ("exits", "failed (SystemExit"),
        ("no_layer", "no linear layer or convolution is its classifier"),
        ("named_wrong", "layer_groups: parameter body.0.weight belongs to the groups []"),
    ],
)
def test_a_network_that_is_no_classifier_is_refused(function: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        own(function)
    assert part in str(caught.value)
    assert str(caught.value).startswith(f"model.name=own_pkg.nets:{function}")


def test_names_of_weights_and_drops_of_libraries_are_refused() -> None:
    assert ModelConfig("own_pkg.nets:build", "auto").problems() == []
    (problem,) = ModelConfig("own_pkg.nets:build", "IMAGENET1K_V1").problems()
    assert "use default" in problem
    (problem,) = ModelConfig("own_pkg.nets:build", "none", dropout=0.1).problems()
    assert "remove model.dropout" in problem


def test_features_depend_on_the_source_of_its_layers(folder_of_code: Path) -> None:
    module = own("build").module
    before = source_digest(module)
    assert source_digest(own("build").module) == before
    file = folder_of_code / "own_pkg" / "nets.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert source_digest(module) != before


def test_a_run_is_resumed_loaded_and_exported(
    folder_of_code: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    run_dir, file = folder_of_code / "run", sorted((folder / "val").rglob("*.png"))[0]
    args = [
        *(arg for arg in small_args(folder) if not arg.startswith("model.")),
        "model.name=own_pkg.nets:build", f"run_dir={run_dir}", "stages.head.augment=none",
        "stages.full.unfreeze=[body,head]",
    ]  # fmt: skip
    assert train([*args, "stages.full.epochs=0"]) == 0
    assert train(args) == 0, "resumed with another stage"
    stages = summary_of(run_dir)["stages"]
    assert stages["head"]["cached"]
    assert stages["full"]["trainable_parameters"] == 6 * 4 * 9 + 6 + 3 * 6 + 3
    with pytest.raises(UserError, match=r"DISTIL_TL_OWN_MODELS=1.*allow_own=True"):
        distil_tl.load(run_dir)
    model, transform, classes = distil_tl.load(run_dir, allow_own=True)
    assert model(transform(file)[None]).shape == (1, len(classes))
    capsys.readouterr()
    name = "model.name=own_pkg.nets:build"
    assert export([str(run_dir), name, "-o", str(folder_of_code / "model.onnx")]) == 0
    monkeypatch.setenv("DISTIL_TL_OWN_MODELS", "1")
    assert predict([str(run_dir), str(file)]) == 0
    assert file.name in capsys.readouterr().out
    assert export([str(run_dir), "--format", "safetensors", "-o", str(folder_of_code / "library")]) == 2
    assert "own_pkg.nets:build is none of them" in capsys.readouterr().err
