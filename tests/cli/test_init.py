"""`distil-tl init`, and configurations that are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_tl import config as configuration
from distil_tl.cli.init import main
from distil_tl.utils.errors import UserError
from launch.sweep_file import read_sweep
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_copy_is_the_file_with_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet50", "mine.yaml"]) == 0
    assert capsys.readouterr().out.startswith("mine.yaml: A ResNet-50 in two stages")
    original = (ROOT / "configs" / "resnet50.yaml").read_text()
    assert Path("mine.yaml").read_text() == original.replace("configs/resnet50.yaml", "mine.yaml")
    Path("configs").mkdir()
    assert main(["resnet50", "configs/resnet50.yaml"]) == 0
    assert Path("configs/resnet50.yaml").read_text() == original, "the command names the copy"
    assert main(["train.sbatch"]) == 0
    text = Path("train.sbatch").read_text()
    assert text.startswith("#!/bin/bash")
    assert "sbatch train.sbatch resnet50 data.root=FOLDER" in text, "files that only a checkout has go by their names"


def test_the_names_are_listed_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    kinds = capsys.readouterr().out.split("\n\n")
    assert [kind.split()[0] for kind in kinds] == ["Configurations,", "Recipes,", "Sweep", "Profiles", "Batch"]
    assert "  random " in kinds[2]
    assert "  resnet50 " in kinds[0]


def test_a_file_is_never_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("resnet50.yaml").write_text("mine")
    assert main(["resnet50.yaml"]) == 2
    assert "resnet50.yaml exists already: give another name" in capsys.readouterr().err
    assert Path("resnet50.yaml").read_text() == "mine"
    assert main(["resnet50", "nowhere/mine.yaml"]) == 2
    assert "can't write nowhere/mine.yaml: No such file or directory" in capsys.readouterr().err


def test_a_name_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet5"]) == 2
    assert "did you mean `resnet50`" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"there is no configuration file .*, did you mean `resnet50`"):
        configuration.load(["resnet5", "data.root=x"])
    with pytest.raises(UserError, match="there is no configuration file"):
        configuration.load(["elsewhere/resnet50", "data.root=x"])


def test_names_are_found_anywhere_and_own_files_come_first() -> None:
    by_name = configuration.load(["gradual", "data.root=x"])[0]
    assert by_name == configuration.load([str(ROOT / "configs" / "gradual.yaml"), "data.root=x"])[0]
    Path("gradual").mkdir()  # a folder of that name is not a configuration
    assert configuration.load(["gradual", "data.root=x"])[0] == by_name
    Path("resnet50").write_text("seed: 7")
    assert configuration.load(["resnet50", "data.root=x"])[0].seed == 7
    assert configuration.load(["gradual", "data.root=x"])[0].seed == 0  # `base:` looks beside its own file


def test_a_copied_sweep_file_finds_its_configuration() -> None:
    assert main(["random"]) == 0
    sweep = read_sweep(Path("random.yaml"))
    assert sweep.config == ROOT / "configs" / "resnet50.yaml"
    assert read_sweep(Path("random")) == sweep
