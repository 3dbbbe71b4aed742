"""`recipe=NAME` is the file configs/recipes/NAME.yaml below all other values; `--print-config` shows the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distil_tl.arguments import check_arguments
from distil_tl.config import RECIPES, Config, check, load, load_saved
from distil_tl.rundir.changes import unsafe_changes
from distil_tl.utils.args import plain, to_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.shipped import shipped_files
from tests.helpers.paths import ROOT


def loaded(*args: str) -> Config:
    return load(["data.root=x", "run_dir=r", *args])[0]


def test_each_recipe_has_a_file() -> None:
    files = {path.stem: path for path in (ROOT / "configs" / "recipes").glob("*.yaml")}
    assert set(files) == set(RECIPES)
    assert {name: shipped_files()[name] for name in RECIPES} == files


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_used_with_any_images(name: str, folder: Path) -> None:
    check(load([f"data.root={folder}", f"recipe={name}", "data.global_batch_size=4"])[0], 1)
    check(load([f"recipe={name}"])[0], 1)  # the demo


def test_the_standard_recipe_is_the_default() -> None:
    config = loaded("recipe=standard")
    assert config.recipe == "standard"
    config.recipe = None
    assert config == loaded()


def test_a_file_and_the_command_line_change_a_recipe(tmp_path: Path) -> None:
    assert list(loaded("recipe=quick").stages) == ["head"]
    assert loaded("recipe=quick", "stages.head.epochs=7").stages["head"].epochs == 7
    file = tmp_path / "my.yaml"
    file.write_text("recipe: quick\nseed: 3\n")
    config = loaded(str(file))
    assert (config.seed, list(config.stages), config.stages["head"].search.wanted) == (3, ["head"], True)
    file.write_text("recipe: quick\nstages: {all: {unfreeze: all, epochs: 2}}\n")
    assert list(loaded(str(file)).stages) == ["all"]
    assert list(loaded(str(file), "recipe=standard").stages) == ["all"]


def test_the_demo_is_not_mirrored_by_a_recipe() -> None:
    config = load(["recipe=quick"])[0]
    assert (config.data.augment, config.data.hflip, config.data.image_size) == ("none", False, 64)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="recipe is 'fast'; choose one of quick, standard, best"):
        check(loaded("recipe=fast"), 1)


def test_a_file_of_the_same_name_is_not_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quick").write_text("seed: 9\n")
    assert loaded("recipe=quick").seed == 0


def test_a_saved_run_keeps_its_values_when_a_recipe_changes(tmp_path: Path) -> None:
    tree = plain(load(["data.root=x", "recipe=quick"])[1])
    tree["stages"]["head"]["epochs"] = 4  # as in an earlier version of the recipe
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert load_saved(tmp_path).stages["head"].epochs == 4
    now = plain(load(["data.root=x", "recipe=quick", f"run_dir={tmp_path}"])[1])
    assert unsafe_changes(tree, now, ["head"]) == ["stages.head.epochs: was 4, now 20"]


def test_the_configuration_is_printed_and_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_arguments("distil_tl.train", ["data.root=x", "recipe=quick", "--print-config", "seed=5"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text == to_yaml(load(["data.root=x", "recipe=quick", "seed=5"])[1])
    (tmp_path / "again.yaml").write_text(text)
    assert loaded(str(tmp_path / "again.yaml")) == loaded("recipe=quick", "seed=5")


@pytest.mark.parametrize("wrong", ["sed=5", "data.augment=lihgt", "stages.head.lr=-1", "metric=top7"])
def test_a_configuration_that_is_wrong_is_not_printed(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_arguments("distil_tl.train", ["--print-config", wrong])
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""
