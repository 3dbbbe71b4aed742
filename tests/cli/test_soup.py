"""`distil-tl soup`: checkpoints of runs averaged into a new run directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import distil_tl
from distil_tl.cli import soups
from distil_tl.cli.predict import main as predict
from distil_tl.cli.soup import main as soup
from distil_tl.cli.soup_candidates import Candidate, named
from distil_tl.config import Config
from distil_tl.rundir.checkpoint import Checkpoints, load_state
from tests.helpers.arguments import small_args
from tests.helpers.images import make_folder
from tests.helpers.ranks import train
from tests.helpers.runs import evaluated, summary_of

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a split test."""
    where = tmp_path_factory.mktemp("soup")
    images = make_folder(where / "images", {"train": 52, "val": 31, "test": 11})
    args = [*small_args(images), f"run_dir={where}/trained", "stages.full.epochs=1"]
    assert train(args) == 0
    return where / "trained"


def variant(trained: Path, path: Path, shift: float = 0.0, change: Change = lambda state: None) -> Path:
    """A copy of the run with one checkpoint: its last one, with the head shifted and its state changed."""
    shutil.copytree(trained, path, symlinks=True)
    last = trained / "checkpoints" / "last"
    weights, state = load_file(last / "weights.safetensors"), load_state(last)
    head = "fc.weight"
    noise = torch.randn(weights[head].shape, generator=torch.Generator().manual_seed(3))
    weights[head] = weights[head] + shift * noise
    change(state)
    shutil.rmtree(path / "checkpoints")
    (path / "checkpoints").mkdir()
    checkpoints = Checkpoints(path / "checkpoints")
    train_state: dict[str, Tensor] = {}
    checkpoints.save(12, weights=weights, train_state=train_state, state=state, is_best=True)
    checkpoints.wait()
    return path


def test_two_runs_on_two_sides_of_a_better_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [variant(trained, tmp_path / name, shift) for name, shift in (("plus", 3.0), ("minus", -3.0))]
    out = tmp_path / "average"
    assert soup([str(runs[0]), str(runs[1] / "checkpoints" / "best"), "-o", str(out), "metric=loss"]) == 0
    said = capsys.readouterr().out
    assert said.count(" added") == 2, said
    assert "average of 2 of 2 checkpoints" in said
    before, after = (load_file(path / "checkpoints/last/weights.safetensors") for path in (trained, out))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-5) for name in before)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]

    summary, expected = summary_of(out), summary_of(trained)
    assert summary["status"] == "completed"
    assert summary["best"]["loss"] == pytest.approx(expected["final"]["loss"], rel=1e-4)
    assert [each["added"] for each in summary["soup"]] == [True, True]
    assert {each["checkpoint"] for each in summary["soup"]} == {"step-00000012"}
    assert summary["soup"][1]["average"] < summary["soup"][0]["average"]
    for split in ("val", "test"):
        name = "evaluation.json" if split == "val" else "evaluation_test.json"
        assert evaluated([str(out), "--split", split, "--json", str(tmp_path / name)]) == 0
        mine, theirs = (json.loads((folder / name).read_text()) for folder in (out, tmp_path))
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["soup"] == summary["soup"]
        assert mine["intervals"] == theirs["intervals"]
        assert summary["calibration"][split]["raw"]["nll"] == pytest.approx(
            theirs["calibration"]["raw"]["nll"], rel=1e-4
        )
    assert summary["intervals"]["top1"][0] < summary["best"]["top1"] < summary["intervals"]["top1"][1]
    assert json.loads((out / "checkpoints/best/calibration.json").read_text())["reason"].startswith("val has 31 images")
    assert summary["test"]["loss"] == mine["loss"]
    page = (out / "report.html").read_text()
    assert "<title>average \u00b7 distil_tl</title>" in page
    assert "Average of checkpoints" in page
    assert f"{runs[1]} step-00000012" in page

    model, transform, classes = distil_tl.load(out)
    image = next((trained.parent / "images" / "val").rglob("*.png"))
    assert model(transform(image)[None]).shape == (1, len(classes))
    assert predict([str(out), str(image), "-o", str(tmp_path / "rows.csv"), "--workers", "0"]) == 0
    capsys.readouterr()
    assert train([str(out / "config.yaml")]) == 0
    assert "holds this run, completed" in capsys.readouterr().out


def test_all_checkpoints_of_one_run_and_an_earlier_output_is_replaced(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "average"
    assert soup([str(trained), "-o", str(out)]) == 0
    assert len(summary_of(out)["soup"]) == 2
    (out / "kept").touch()
    write = soups.write_run

    def interrupted(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(soups, "write_run", interrupted)
    assert soup([str(trained), "-o", str(out)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["average"]
    assert (out / "kept").exists(), "the earlier output is there as it was"
    monkeypatch.undo()
    assert soup([str(trained), "-o", str(out)]) == 0
    assert not (out / "kept").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["average"]
    capsys.readouterr()


def in_another_order(state: dict[str, Any]) -> None:
    state["classes"].reverse()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.update(classes=["a", "b", "c"]), "has other classes than"),
        (in_another_order, "has other classes than trained/step-00000006 (in another order)"),
        (lambda state: state["preprocess"].update(resize_size=99), "has the preprocessing"),
        (lambda state: state["data"].update(val="0"), "was evaluated on other images than"),
        ("name: timm/test_resnet,name: timm/test_vit", "is timm/test_vit, and trained/step-00000006 is"),
        ("image_size: 32,image_size: 48", "has the image size 48"),
    ],
)
def test_what_can_not_be_averaged(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    other = variant(trained, tmp_path / "other", change=change if callable(change) else lambda state: None)
    if not callable(change):
        path = other / "config.yaml"
        path.write_text(path.read_text().replace(*change.split(",")))
    assert soup([str(trained), str(other), "-o", str(tmp_path / "average")]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "average").exists()


def test_wrong_arguments(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = variant(trained, tmp_path / "single")
    unfinished = variant(trained, tmp_path / "unfinished", change=lambda state: state["run"]["position"].update(step=9))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for paths, out, said in (
        ([single], "average", "needs at least two checkpoints"),
        ([single, single / "checkpoints" / "last"], "average", "has one: give several runs"),
        ([single, unfinished], "average", "left out, as it was not evaluated"),
        ([single, tmp_path / "mine"], "average", "is not a run directory, nor a checkpoint"),
        ([trained], "mine", "is no earlier output of this command"),
        ([trained], "none/average", "there is no folder"),
        ([trained, single], "single", "is one of the inputs"),
        ([trained, single], "average metric=top7", "metric is 'top7'"),
        (
            [trained, single],
            "average data.image_size=64",
            "data.image_size=64: the checkpoints were evaluated otherwise",
        ),
    ):
        output, *more = out.split()
        assert soup([*map(str, paths), "-o", str(tmp_path / output), *more]) == 2, said
        found = capsys.readouterr()
        assert said in found.err + found.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "single", "unfinished"]


@pytest.mark.parametrize(
    ("runs", "names"), [(("a/seed-0", "b/seed-0"), ["a/seed-0", "b/seed-0"]), (("a/x", "a/y", "a/x"), ["x", "y", "x"])]
)
def test_runs_are_named_by_as_few_folders_as_tell_them_apart(
    tmp_path: Path, runs: tuple[str, ...], names: list[str]
) -> None:
    found = [Candidate(tmp_path / run / "checkpoints" / "last", Config(), {}, "") for run in runs]
    assert [candidate.name for candidate in named(found)] == [f"{name}/last" for name in names]
