"""The files in configs/ match their headers, and docs/configuration.md lists every key as in the code."""

from __future__ import annotations

import functools
import operator
import re
from pathlib import Path

import pytest
import torch

from distil_tl import arguments
from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.rundir.changes import FREE_ON_RESUME
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import check_stages
from tests.helpers.paths import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))
REFERENCE = ROOT / "docs" / "configuration.md"
PICTURE = ROOT / "docs" / "staged-schedule.svg"

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def load(path: Path, *overrides: str) -> Config:
    return configuration.load([str(path), *overrides])[0]


@functools.cache
def architecture(name: str, image_size: int | None) -> TransferModel:
    """Names and shapes of a model, without weights to read or memory for them."""
    with torch.device("meta"):
        return build(ModelConfig(name), 10, image_size=image_size, seed=0, pretrained=False)


def test_the_folder_is_found() -> None:
    assert {"demo", "resnet50", "gradual", "vit_b_16", "mobilenet_v2_features"} <= {path.stem for path in FILES}


@each_file
def test_it_is_accepted_with_a_folder_of_images_on_1_to_8_ranks(path: Path, folder: Path) -> None:
    for world_size in (1, 2, 4, 8):
        configuration.check(load(path, f"data.root={folder}"), world_size)


@each_file
def test_its_model_has_the_groups_that_its_stages_name(path: Path) -> None:
    config = load(path, "data.root=x")
    check_stages(architecture(config.model.name, config.data.image_size), config.stages)


@each_file
def test_its_header_says_how_to_run_it_and_what_to_expect(path: Path) -> None:
    text = path.read_text()
    header = "\n".join(line[1:] for line in text[: re.search(r"^[^#]", text, re.MULTILINE).start()].splitlines())  # type: ignore[union-attr]
    command = re.search(r"^   torchrun .*-m distil_tl\.train (.+)$", header, re.MULTILINE)
    assert command, "the command is missing"
    named, *overrides = command[1].split()
    assert named == f"configs/{path.name}"
    assert overrides == ([] if path.stem == "demo" else ["data.root=FOLDER"])
    for word in ("Expect:", "Time:", "Hardware:", "Needs:"):
        assert re.search(rf"^ {word} ", header, re.MULTILINE), word
    known = {key.replace(".head.", ".").replace(".full.", ".") for key in usage_rows()}
    for key in re.findall(r"\b((?:\w+\.)+\w+)=", header):
        assert re.sub(r"^stages\.\w+\.", "stages.", key) in known, key


def test_the_demo_is_the_embedded_default() -> None:
    assert load(ROOT / "configs" / "demo.yaml") == configuration.load([])[0]


def test_the_base_of_gradual_gives_everything_but_the_stages() -> None:
    names = ("gradual.yaml", "resnet50.yaml")
    gradual, base = (load(ROOT / "configs" / name, "run_dir=x", "data.root=x") for name in names)
    assert list(gradual.stages) == ["head", "top", "full"]
    gradual.stages = base.stages
    assert gradual == base


def test_the_picture_shows_gradual() -> None:
    picture = PICTURE.read_text()
    config = load(ROOT / "configs" / "gradual.yaml", "data.root=x")
    parts = re.split(r"<!-- stage (\w+) -->", picture)
    drawn = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(drawn) == list(config.stages)
    groups = architecture(config.model.name, None).group_names[::-1]
    assert re.findall(r'font-weight="600">([\w.]+)</text>', parts[0]) == list(groups)
    for name, stage in config.stages.items():
        assert f">{stage.epochs} epochs" in drawn[name]
        trained = (
            groups if stage.unfreeze == "all" else groups[: 1 if stage.unfreeze == "head" else len(stage.unfreeze)]
        )
        rates = [f"{stage.lr * stage.layer_decay**depth:.2g}" for depth in range(len(trained))]
        assert re.findall(r">lr ([\d.]+)<", drawn[name]) == rates


# docs/configuration.md.


def usage_rows() -> dict[str, tuple[str, str]]:
    """Default and meaning of each key, as in --help."""
    lines = re.findall(r"^  ([\w.]+)=(\S*) *(.*)$", arguments.usage("train"), re.MULTILINE)
    return {key: (default, meaning) for key, default, meaning in lines}


def wanted_rows() -> list[str]:
    """The rows of the reference's tables. A stage's keys have one row for all stages."""
    rows = []
    usage = usage_rows()
    for key, (default, meaning) in usage.items():
        meaning = meaning.replace("|", "\\|")
        if key.startswith("stages.head."):
            name = key.removeprefix("stages.head.")
            own = operator.attrgetter(name)(StageConfig())
            defaults = ["null" if own is None else str(own), default, usage[f"stages.full.{name}"][0]]
            rows.append(f"| `stages.NAME.{name}` | " + " | ".join(f"`{each}`" for each in defaults) + f" | {meaning} |")
        elif not key.startswith("stages."):
            rows.append(f"| `{key}` | `{default}` | {meaning} |")
    return rows


def test_the_reference_lists_every_key_with_its_default_and_meaning() -> None:
    found = [line for line in REFERENCE.read_text().splitlines() if line.startswith("| `")]
    wanted = wanted_rows()
    put_in, take_out = [row for row in wanted if row not in found], [row for row in found if row not in wanted]
    assert put_in + take_out == [], "\n".join(["put into docs/configuration.md:", *put_in, "take out:", *take_out])
    assert found == wanted, "the order is not that of --help"


def test_the_reference_lists_the_keys_that_may_change() -> None:
    lines = REFERENCE.read_text().splitlines()
    listed = lines[lines.index("These keys may change when a run is resumed:") + 2]
    assert sorted(re.findall(r"`([^`]+)`", listed)) == sorted(re.sub(r"\.$", ".*", key) for key in FREE_ON_RESUME)
