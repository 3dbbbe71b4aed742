"""`distil-tl models`: which models there are, their sizes, and whether their weights are on this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from distil_tl.cli.models import main
from distil_tl.models import catalogue, torchvision_models
from distil_tl.models.facts import entry_of
from distil_tl.models.model_table import Entry, read_table
from distil_tl.models.weight_packages import WeightsPackage


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def rows(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, dict[str, object]]:
    assert main([*args, "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def is_of_installed(library: str) -> bool:
    return catalogue.version(library) == read_table()[0][library]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "regnet_x_400mf", "timm/tf_efficientnet_lite0"])
def test_the_table_has_what_the_code_finds(name: str) -> None:
    if not is_of_installed("timm" if name.startswith("timm/") else "torchvision"):
        pytest.skip("the table is of another version")
    assert read_table()[1][name] == entry_of(name)


def test_every_classifier_of_torchvision_is_in_the_table() -> None:
    if not is_of_installed("torchvision"):
        pytest.skip("the table is of another version")
    assert [entry.name for entry in catalogue.find("*") if "/" not in entry.name] == torchvision_models.names()


def test_a_line_is_read_as_it_was_written() -> None:
    for entry in (
        Entry("resnet18", 1, 2, None, "W", "f.pth"),
        Entry("timm/x", 1, 2, 3, "", ""),
        Entry("timm/x", 1, 2, 3, "a", "b"),
    ):
        assert Entry.from_line(entry.line) == entry
    usual = Entry.from_line("timm/x\t1\t2\t3\ta")
    assert (usual.source, usual.line) == ("timm/x.a", "timm/x\t1\t2\t3\ta")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("net1*", []),
        ("resnet1*", ["resnet18", "timm/resnet18"]),
        ("resnet18", ["resnet18", "timm/resnet18", "timm/seresnet18"]),
        ("timm/vit_[st]*", ["timm/vit_small", "timm/vit_tiny"]),
    ],
)  # fmt: skip
def test_a_pattern_is_a_part_of_the_name_or_has_wildcards(
    pattern: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("resnet18", "vit_b_16", "timm/resnet18", "timm/seresnet18", "timm/vit_small", "timm/vit_tiny")
    versions = read_table()[0]
    monkeypatch.setattr(catalogue, "version", versions.get)
    monkeypatch.setattr(catalogue, "read_table", lambda: (versions, {name: Entry(name, 1, 2, 3) for name in names}))
    assert [entry.name for entry in catalogue.find(pattern)] == found


def test_the_lines_have_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mobilenet_v3_small"]) == 0
    written = capsys.readouterr()
    assert written.out.splitlines() == [
        "name                parameters  GMACs  image size  weights        here",
        "mobilenet_v3_small       1.5 M   0.06         224  IMAGENET1K_V1  no",
    ]
    assert "1 model. Use one as model.name=NAME" in written.err


def test_all_sets_of_weights_with_a_dot(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    names = rows(capsys, "timm/convnextv2_atto.*")
    assert list(names) == ["timm/convnextv2_atto.fcmae", "timm/convnextv2_atto.fcmae_ft_in1k"]
    assert [row["weights"] for row in names.values()] == ["fcmae", "fcmae_ft_in1k"]
    assert len({row["parameters"] for row in names.values()}) == 1


def test_weights_on_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightsPackage, "file", lambda self: None)
    names = ("resnet18", "timm/resnet18", "timm/tf_efficientnet_lite0")
    entries = read_table()[1]

    def here() -> list[bool | None]:
        return [catalogue.weights_here(entries[name]) for name in names]

    assert here() == [False, False, False]
    file = tmp_path / "torch" / "hub" / "checkpoints" / entries["resnet18"].source
    file.parent.mkdir(parents=True)
    file.touch()
    repository = tmp_path / "huggingface" / "hub" / f"models--timm--resnet18.{entries['timm/resnet18'].weights}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repository.parent))  # read at its import
    assert here() == [True, False, False]
    (repository / "snapshots" / "abc" / "model.safetensors").touch()
    assert here() == [True, True, False]
    monkeypatch.setattr(WeightsPackage, "file", lambda self: file)
    assert here() == [True, True, True]
    assert "resnet18" in rows(capsys, "resnet*", "--here")
    assert catalogue.weights_here(Entry("timm/x", 1, 2, 3)) is None


def test_models_of_another_version_are_built_if_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    versions, table = read_table()
    short = {name: entry for name, entry in table.items() if name != "mobilenet_v3_small"}
    monkeypatch.setattr(catalogue, "version", {"torchvision": "0.1"}.get)
    monkeypatch.setattr(catalogue, "read_table", lambda: (versions, short))
    wanted = [table["mobilenet_v3_large"], table["mobilenet_v3_small"]]
    assert catalogue.find("mobilenet_v3_*") == wanted
    monkeypatch.setattr(catalogue, "MOST_BUILT", 0)
    unknown = dataclasses.replace(wanted[1], parameters=None, macs=None)
    assert catalogue.find("mobilenet_v3_*") == [wanted[0], unknown]


def test_without_timm_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = read_table()[0]
    monkeypatch.setattr(catalogue, "version", {"torchvision": versions["torchvision"]}.get)
    assert main(["resnet1*"]) == 0
    written = capsys.readouterr()
    assert "timm/" not in written.out
    assert "pip install 'distil_tl[timm]'" in written.err
    assert main(["convnextv2"]) == 2
    assert "no model matches 'convnextv2'" in (said := capsys.readouterr().err)
    assert "pip install 'distil_tl[timm]'" in said


def test_no_model_of_this_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnt50"]) == 2
    assert "no model matches 'resnt50', did you mean `resnet50`" in capsys.readouterr().err
