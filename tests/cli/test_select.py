"""`distil-tl select`: the same result on any number of ranks, kept when it is interrupted, and trained by best.yaml."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distil_tl import train as train_module
from distil_tl.cli import select as command
from distil_tl.cli.selection import _Selection
from distil_tl.models.transfer import build
from distil_tl.rundir import lock
from distil_tl.rundir.lock import Attempt
from distil_tl.selection import cell_search, cells, costs, pruning
from distil_tl.selection.cell_search import CellSearch
from distil_tl.selection.cells import Cell
from distil_tl.selection.config import HEADS
from distil_tl.selection.estimate import NoEstimateError
from distil_tl.selection.heads import HeadSearches
from distil_tl.selection.outcome import LOCK
from distil_tl.training import feature_extraction, stage_setup
from distil_tl.training.features import FeaturesUnavailableError
from distil_tl.training.heads import search as head_fits
from distil_tl.utils.errors import NonFiniteError, UserError
from tests.helpers.arguments import SMALLEST
from tests.helpers.images import make_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import summary_of

TWO = f"candidates=[{SMALLEST},timm/test_efficientnet]"


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS", 0.0)


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    """A small grid with random weights."""
    return [
        f"data.root={folder}", "data.global_batch_size=8", "data.workers=0", "model.weights=none", "precision=fp32",
        "distributed.device=cpu", "distributed.timeout_seconds=60", "stages.head.epochs=2", "optim.name=adamw",
        "stages.head.search.lr=[0.1,0.003]", "stages.head.search.weight_decay=[0.01]", *more, "--out", str(out),
    ]  # fmt: skip


def select(args: list[str], cache: str | None = None) -> int:
    """`distil-tl select` in this process."""
    if cache is not None:
        os.environ["DISTIL_TL_CACHE"] = cache
    return command.main(args)


@pytest.mark.parametrize(("option", "named"), [("--sub", "--sub"), ("--submit", "distil-tl select --submit")])
def test_what_should_be_submitted_does_not_run_here(
    option: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distil_tl.cli.selection.select", lambda *args: None)
    assert select([f"candidates={SMALLEST}", "model.weights=none", option]) == 2
    assert named in capsys.readouterr().err


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "select.json").read_text())
    return found


TIMES = ("seconds", "images_per_second", "ranks", "budget_seconds")  # fields that differ from call to call


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def test_all_cells_are_ranked_and_the_second_call_repeats_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(folder, tmp_path / "out", TWO, "sizes=40", "crops=[weights,squash]")
    assert select(args) == 0
    found, printed = content(tmp_path / "out"), capsys.readouterr().out
    rows = found["rows"]
    assert len({(row["model"], row["image_size"], row["crop_mode"]) for row in rows}) == len(rows) == 4
    assert [row["top1"] for row in rows] == sorted((row["top1"] for row in rows), reverse=True)
    assert found["images"] == {"train": 52, "val": 31}
    assert found["not_tried"] == []
    for row in rows:
        low, high = row["interval"]
        assert 0 <= low <= row["top1"] <= high <= 1
        assert row["top1"] == max(head["top1"] for head in row["heads"])
        assert len(row["heads"]) == 2
        assert row["gmacs"] > 0
        assert row["parameters"] > 1000
        assert row["near_best"] == (row["top1"] >= rows[0]["interval"][0])
    assert [effect["pairs"] for effect in found["effects"]] == [2]
    assert "within its interval" in (tmp_path / "out" / "select.html").read_text()
    assert found["near_best"] == sum(row["near_best"] for row in rows)
    assert rows[0]["pareto"]
    assert "images of train, by nested cross-validation" in printed
    assert found["estimate"]["n"] == 52
    assert printed.count("timm/test_efficientnet 40 px squash") >= 2, "it was announced, and then it had a figure"

    monkeypatch.setattr(CellSearch, "search", None)
    monkeypatch.setattr(CellSearch, "open_cell", None)
    assert select(args) == 0
    assert without_times(content(tmp_path / "out")) == without_times(found)


def test_best_yaml_trains_the_head_that_was_chosen(folder: Path, tmp_path: Path) -> None:
    crops = ("sizes=40", "crops=squash", "metric=macro_f1")
    assert select(arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", *crops)) == 0
    best = content(tmp_path / "out")["best"]
    tree = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert list(tree["stages"]) == ["head", "full"]
    assert tree["data"] == {
        "root": str(folder), "global_batch_size": 8, "workers": 0, "image_size": 40, "crop_mode": "squash",
    }  # fmt: skip
    run = tmp_path / "run"
    assert train_module.main([str(tmp_path / "out" / "best.yaml"), f"run_dir={run}", "stages.full.epochs=0"]) == 0
    summary = summary_of(run)
    assert summary["final"]["top1"] == best["top1"]
    assert summary["final"]["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert summary["stages"]["head"]["search"]["lr"] == best["lr"]
    assert summary["best"]["epoch"] == summary["final"]["epoch"]
    assert best["interval"] == summary["intervals"]["macro_f1"]
    low, high = content(tmp_path / "out")["estimate"]["interval"]
    assert low <= content(tmp_path / "out")["estimate"]["value"] <= high


@pytest.mark.parametrize("heads", ["knn,ridge,lda", "knn,mlp"])
def test_best_yaml_fits_the_head_that_was_chosen(folder: Path, tmp_path: Path, heads: str) -> None:
    grid = (f"candidates={SMALLEST}", "sizes=40", f"heads=[{heads}]")
    assert select(arguments(folder, tmp_path / "out", *grid)) == 0
    rows, best = content(tmp_path / "out")["rows"], content(tmp_path / "out")["best_yaml"]
    (row,) = (row for row in rows if row["head"] == best["head"])
    tree = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    head = {"unfreeze": "head", "augment": "none", "features": "on", "head": row["head"]}
    assert tree["stages"]["head"] == head
    run = tmp_path / "run"
    assert train_module.main([str(tmp_path / "out" / "best.yaml"), f"run_dir={run}", "stages.full.epochs=0"]) == 0
    fit, final = summary_of(run)["stages"]["head"]["fit"], summary_of(run)["final"]
    assert fit["heads"] == row["heads"]
    assert final["top1"] == row["top1"] == fit["top1"]


def test_it_is_the_same_on_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    found = []
    for world in (1, 2, 4):
        out, cache = tmp_path / f"out{world}", str(tmp_path / f"cache{world}")
        grid = (TWO, "sizes=[32]", "crops=squash", "heads=all", "readouts=[pooled,last2]", "metric=macro_f1")
        assert run_ranks(world, select, arguments(folder, out, *grid), cache) == [0] * world
        assert content(out)["ranks"] == world
        found.append(without_times(content(out)))
    assert found[0] == found[1] == found[2]
    assert found[0]["estimate"]["split"] == "train"
    assert len(found[0]["rows"]) == 2 * 2 * len(HEADS)
    assert all(row["interval"] is not None for row in found[0]["rows"])


def test_read_outs_and_crops_share_a_network_and_read_outs_its_passes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    networks = list[weakref.ref[Any]]()

    def build_alone(*args: Any, **kwargs: Any) -> Any:
        assert not [each for each in networks if each() is not None], "the former network is released first"
        done.append("build")
        model = build(*args, **kwargs)
        networks.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(cell_search, "build", build_alone)
    counted(stage_setup, "cut_frozen_prefix")
    counted(feature_extraction, "_compute_chunk")
    searched, original = list[Cell](), CellSearch.search

    def search(self: CellSearch, cell: Cell, kinds: list[str], keep: Any) -> dict[str, str]:
        if len(searched) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        searched.append(cell)
        return original(self, cell, kinds, keep)

    # A network with a class token lacks last2, and its token is what is pooled.
    names = f"candidates=[{SMALLEST},timm/test_vit]"
    grid = (names, "sizes=48", "crops=[weights,squash]", "readouts=[pooled,last2,token,mean]", "heads=[linear,ridge]")
    args = arguments(folder, tmp_path / "out", *grid)
    with monkeypatch.context() as patch:
        patch.setattr(CellSearch, "search", search)
        assert select(args) == 3
    assert [each.readout for each in searched] == ["pooled", "mean"], "it follows, as its features are there"
    assert done == ["build", "cut_frozen_prefix", "_compute_chunk", "_compute_chunk"]
    assert select(args) == 0
    assert done.count("_compute_chunk") == 2 * 2 * 2, "once for each network, crop and split"
    assert done.count("build") == done.count("cut_frozen_prefix") <= 1 + 2 + 2
    found, page = content(tmp_path / "out"), (tmp_path / "out" / "select.html").read_text()
    rows = {(row["model"], row["crop_mode"], row["readout"], row["head"]): row for row in found["rows"]}
    tried = {SMALLEST: ("pooled", "last2"), "timm/test_vit": ("pooled", "mean")}
    assert set(rows) == {
        (model, crop, readout, head) for model, readouts in tried.items() for crop in ("weights", "squash")
        for readout in readouts for head in ("linear", "ridge")
    }  # fmt: skip
    assert "it gives the same as pooled" in found["left_out"]["timm/test_vit 48 px token"]
    assert "no layer of it averages" in found["left_out"]["timm/test_vit 48 px last2"]
    assert "no tokens" in found["left_out"][f"{SMALLEST} 48 px mean"]
    assert {(each["value"], each["pairs"]) for each in found["effects"] if each["key"] == "readout"} == {
        ("last2", 4), ("mean", 4),
    }  # fmt: skip
    pooled, last2 = (rows[SMALLEST, "squash", readout, "linear"] for readout in ("pooled", "last2"))
    wider = last2["features"] - pooled["features"]
    assert wider > 0
    assert last2["parameters"] - pooled["parameters"] == len(found["classes"]) * wider
    assert "squash, last2" in page
    assert "squash last2" in capsys.readouterr().out

    # Alone each has the same figures.
    for readout in ("pooled", "last2"):
        out, alone = tmp_path / readout, (f"candidates={SMALLEST}", "sizes=48", "crops=squash", f"readouts={readout}")
        assert select(arguments(folder, out, *alone), str(tmp_path / f"cache-{readout}")) == 0
        (row,) = content(out)["rows"]
        changed = {"near_best": None, "pareto": None, "seconds": None, "images_per_second": None}
        assert {**row, **changed} == {**rows[SMALLEST, "squash", readout, "linear"], **changed}
    model = yaml.safe_load((tmp_path / "last2" / "best.yaml").read_text())["model"]
    assert model == {"name": SMALLEST, "weights": "none", "readout": "last2"}
    best, run = tmp_path / "last2" / "best.yaml", tmp_path / "run"
    assert train_module.main([str(best), f"run_dir={run}", "stages.full.epochs=0"]) == 0
    assert summary_of(run)["final"]["top1"] == row["top1"]


def test_of_a_long_list_only_the_best_by_logme_are_searched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On any number of ranks the same ones; a network that can't be used takes no place; scores are kept."""
    names = f"candidates=[squeezenet1_1,{SMALLEST},timm/test_efficientnet]"
    grid = (names, "sizes=[48,32]", "keep=1")
    for world in (1, 2):
        args = arguments(folder, tmp_path / f"out{world}", *grid)
        assert run_ranks(world, select, args, str(tmp_path / f"cache{world}")) == [0] * world
    found = content(tmp_path / "out1")
    assert without_times(found) == without_times(content(tmp_path / "out2"))
    scores = found["pruning"]["scores"]
    assert [(score["kept"], score["image_size"], score["images"]) for score in scores] == [
        (True, 32, 52), (False, 32, 52),
    ]  # fmt: skip
    assert [score["logme"] for score in scores] == sorted((score["logme"] for score in scores), reverse=True)
    assert {row["model"] for row in found["rows"]} == {score["model"] for score in scores[:1]}
    assert "single linear layer" in found["left_out"]["squeezenet1_1 32 px"]
    page = (tmp_path / "out1" / "select.html").read_text()
    assert f"{scores[1]['logme']:.4f}" in page

    monkeypatch.setattr(pruning, "logme", None)
    assert select(arguments(folder, tmp_path / "out1", *grid), str(tmp_path / "cache1")) == 0
    assert f"pruned by LogME: {scores[1]['model']}" in capsys.readouterr().out
    assert without_times(content(tmp_path / "out1")) == without_times(found)


def test_an_interrupted_selection_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = (TWO, "sizes=32", "heads=[linear,logistic,knn]")
    args, searched = arguments(folder, tmp_path / "out", *grid), list[str]()
    original = CellSearch.search

    def search(self: CellSearch, cell: Cell, kinds: list[str], keep: Any) -> dict[str, str]:
        if searched:
            os.kill(os.getpid(), signal.SIGTERM)
        searched.append(cell.name)
        return original(self, cell, kinds, keep)

    with monkeypatch.context() as patch:
        patch.setattr(CellSearch, "search", search)
        assert select(args) == 3
    assert "1 of 2 cells are saved" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3, "one for each head"
    assert not (tmp_path / "out" / "select.json").exists()
    assert len(searched) == 2
    again: list[str] = []

    def record(self: CellSearch, cell: Cell, kinds: list[str], keep: Any) -> dict[str, str]:
        again.append(cell.name)
        return original(self, cell, kinds, keep)

    with monkeypatch.context() as patch:
        patch.setattr(CellSearch, "search", record)
        assert select(args) == 0
    assert again == searched[1:]
    assert select(arguments(folder, tmp_path / "whole", *grid)) == 0
    assert without_times(content(tmp_path / "out")) == without_times(content(tmp_path / "whole"))


def test_heads_of_an_interrupted_cell_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = (f"candidates={SMALLEST}", "sizes=32", "heads=[linear,ridge,logistic]")
    args, asked, original = arguments(folder, tmp_path / "out", *grid), list[str](), HeadSearches.result

    def result(self: HeadSearches, kind: str, chosen: Any = None) -> Any:
        if asked == ["linear", "ridge"]:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(kind)
        return original(self, kind, chosen)

    monkeypatch.setattr(HeadSearches, "result", result)
    assert select(args) == 3
    assert "0 of 1 cells are saved" in capsys.readouterr().err
    assert select(args) == 0
    assert asked[2:4] == ["logistic", "logistic"], "the others are there"
    assert select(arguments(folder, tmp_path / "whole", *grid)) == 0
    assert without_times(content(tmp_path / "out")) == without_times(content(tmp_path / "whole"))


def test_heads_that_are_added_use_the_features_and_leave_the_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, asked = (f"candidates={SMALLEST}", "sizes=32"), list[list[str]]()
    assert select(arguments(folder, tmp_path / "out", *grid)) == 0
    (linear,) = content(tmp_path / "out")["rows"]
    original = CellSearch.search

    def record(self: CellSearch, cell: Cell, kinds: list[str], keep: Any) -> dict[str, str]:
        asked.append(list(kinds))
        return original(self, cell, kinds, keep)

    monkeypatch.setattr(CellSearch, "search", record)
    heads = ["linear", "ridge", "lda", "prototypes", "knn"]
    assert select(arguments(folder, tmp_path / "out", *grid, f"heads=[{','.join(heads)}]")) == 0
    found = content(tmp_path / "out")
    assert asked == [heads[1:]]
    rows = {row["head"]: row for row in found["rows"]}
    assert sorted(rows) == sorted(heads)
    assert {**rows["linear"], "near_best": None, "pareto": None} == {**linear, "near_best": None, "pareto": None}
    effects = {effect["value"]: effect for effect in found["effects"]}
    assert set(effects) == set(heads[1:])
    assert effects["ridge"]["mean"] == pytest.approx(rows["ridge"]["top1"] - linear["top1"])
    assert effects["ridge"]["compared_with"] == "linear"
    assert set(rows["ridge"]["heads"][0]) == {"penalty", "scale", "top1", "loss"}
    assert rows["lda"]["shrinkage"] in [head["shrinkage"] for head in rows["lda"]["heads"]]
    best, page = found["rows"][0], (tmp_path / "out" / "select.html").read_text()
    assert best["top1"] == max(row["top1"] for row in found["rows"])
    for row in found["rows"]:
        assert f">{row['head']} " in page or f">{row['head']}<" in page
    assert "ridge penalty" in capsys.readouterr().out


def test_a_kind_of_head_that_fails_leaves_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first call, and in one with results of the others."""

    def fit_knn(*args: Any) -> None:
        raise UserError("too little memory")

    def fit_lda(*args: Any) -> None:
        raise NonFiniteError("not finite")

    monkeypatch.setattr(head_fits, "fit_knn", fit_knn)
    monkeypatch.setattr(head_fits, "fit_lda", fit_lda)
    args = arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=32", "heads=[knn,lda,prototypes]")
    for failed in (f"{SMALLEST} 32 px weights, knn head", f"{SMALLEST} 32 px weights, lda head"):
        assert select(args) == 0
        found = content(tmp_path / "out")
        assert [row["head"] for row in found["rows"]] == ["prototypes"]
        assert len(found["left_out"]) == 2
        assert found["left_out"][failed] in ("too little memory", "not finite", "too little memory; not finite")
        assert f"left out: {failed}: " in capsys.readouterr().out


def test_a_head_that_is_only_compared_leaves_best_yaml_to_the_linear_search(folder: Path, tmp_path: Path) -> None:
    args = arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=32", "heads=[knn]")
    assert select(args) == 0
    found = content(tmp_path / "out")
    assert found["best"]["head"] == "knn"
    assert found["best_yaml"] == {
        "model": SMALLEST,
        "image_size": 32,
        "crop_mode": "weights",
        "readout": "pooled",
        "head": "linear",
    }
    assert "as a knn head is only compared" in (tmp_path / "out" / "select.html").read_text()
    head = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["stages"]["head"]
    assert head["search"]["lr"] == [0.1, 0.003]


def test_the_figure_to_expect_is_of_what_best_yaml_begins_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=32", "heads=[ridge,lda]")
    assert select(args) == 0
    best = content(tmp_path / "out")["best"]["head"]
    (other,) = {"ridge", "lda"} - {best}
    monkeypatch.setattr(cells, "STARTABLE", (other,))
    assert select(args) == 0
    estimates = sorted(path.name.split(".")[1] for path in (tmp_path / "out" / "cells").glob("*.estimate.json"))
    assert estimates == sorted([f"{best}2", f"{other}2"]), "the second one is of the head that can be trained"


def test_images_of_test_give_the_estimate(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", {"train": 40, "val": 15, "test": 12})
    assert select(arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=32")) == 0
    estimate = content(tmp_path / "out")["estimate"]
    assert (estimate["split"], estimate["n"]) == ("test", 12)
    assert (estimate["value"] * 12) % 1 == pytest.approx(0)
    best, run = tmp_path / "out" / "best.yaml", tmp_path / "run"
    assert train_module.main([str(best), f"run_dir={run}", "stages.full.epochs=0", "checkpoint.keep=2"]) == 0
    figures, summary = summary_of(run)["test"], summary_of(run)
    if summary["best"]["epoch"] == summary["final"]["epoch"]:  # the estimate is of the last epoch
        assert figures["top1"] == pytest.approx(estimate["value"])

    # Of two ranks only one reads the broken image, and both go on. The results are written all the same.
    next((folder / "test").rglob("*.png")).write_bytes(b"")
    again = arguments(folder, tmp_path / "again", f"candidates={SMALLEST}", "sizes=32")
    assert run_ranks(2, select, again, str(tmp_path / "cache")) == [0, 0]
    assert "can't use the image" in content(tmp_path / "again")["no_estimate"]


def test_too_few_images_for_a_cross_validation_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (f"candidates={SMALLEST}", "sizes=32", "data.global_batch_size=48")
    assert select(arguments(folder, tmp_path / "out", *more)) == 0
    assert content(tmp_path / "out")["estimate"] is None
    assert "30 images, fewer than one global batch: set data.global_batch_size to at most 30" in capsys.readouterr().out


def test_a_budget_ends_it_with_the_best_so_far(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fits(self: Any, cell: Cell, budget: float) -> bool:
        asked.append(cell.name)
        return fitted(dataclasses.replace(self, began=self.began - 1000), cell, budget)

    fitted = _Selection.fits
    monkeypatch.setattr(_Selection, "fits", fits)
    assert select([*arguments(folder, tmp_path / "out", TWO, "sizes=32"), "--budget", "1m"]) == 0
    found = content(tmp_path / "out")
    assert len(found["rows"]) == 1
    assert [cell["model"] for cell in found["not_tried"]] == asked, "the first one is tried in any case"
    assert found["budget_seconds"] == 60


def test_what_cannot_be_used_is_named_and_the_rest_is_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The head of SqueezeNet is a convolution; test_vit takes multiples of 16 pixels.
    names = f"candidates=[squeezenet1_1,timm/test_vit,{SMALLEST}]"
    assert select(arguments(folder, tmp_path / "out", names, "sizes=[40]")) == 0
    found = content(tmp_path / "out")
    assert [row["model"] for row in found["rows"]] == [SMALLEST]
    assert "single linear layer" in found["left_out"]["squeezenet1_1 40 px"]
    assert "multiple of 16" in found["left_out"]["timm/test_vit 40 px"]
    assert "left out: timm/test_vit" in capsys.readouterr().out

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    missing = [*arguments(folder, tmp_path / "none", "candidates=[resnet18,resnet34]"), "model.weights=auto"]
    assert select(missing) == 2
    assert "for name in resnet18 resnet34; do distil-tl prefetch model.name=$name; done" in capsys.readouterr().err


def test_features_that_can_not_be_kept_are_the_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_all(self: Any) -> None:
        raise FeaturesUnavailableError("they can't be written to CACHE: No space left on device")

    args = arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=[32,40]")
    with monkeypatch.context() as patch:
        patch.setattr(feature_extraction.FeatureExtractor, "open_all", open_all)
        assert select(args) == 2
    said = capsys.readouterr().err
    assert f"{SMALLEST} 32 px: no features: they can't be written to CACHE" in said
    assert "remove the search" not in said
    assert select(args) == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["candidates=[renset18]"], "resnet18"),
        (["crops=[squish]", "sizes=[1]"], "2 problems"),
        (["heads=[rigde]"], "ridge"),
        (["heads=[]"], "heads is empty"),
        (["--budget", "10"], "10m"),
        (["stages.head.mixup=0.2"], "mixes images"),
        (["nosuch=1"], "nosuch"),
        (["candidate=small"], "did you mean `candidates`?"),
        (["size=64"], "did you mean `sizes`?"),
        (["seeds=1"], "did you mean `seed`"),
        (["slurm.nodes=2"], "slurm.nodes is of a job: add --submit"),
        (["keep=0"], "keep=0"),
        (["keep=few"], "as in keep=5"),
        (["data.image_size=64"], "give sizes=[...]"),
        (["stages.head.ema=0.9"], "heads are compared without an average"),
        (["stages.full.search.lr=[0.1,0.2]"], "stages.full.search"),
        (["stages.full.distill.teacher=nowhere"], "nowhere"),
        (["model.name=resnet50"], "give candidates=[...]"),
        (["--nosuch"], "--nosuch"),
        (["stages.head.head=mlp"], "give heads=[mlp] in place of it"),
        (["readouts=[token]"], "model.readout=token: not possible with"),
        (["heads=[logistic,ridge]", "data.balance=logit_adjust"], "has no effect on heads=ridge"),
    ],
)
def test_wrong_arguments_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], named: str
) -> None:
    assert select(arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", *more)) == 2
    assert named in capsys.readouterr().err


def test_a_stage_that_trains_more_than_the_head_gets_no_search_of_ours(folder: Path, tmp_path: Path) -> None:
    args = arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=32", "stages.head.unfreeze=2")
    assert select([arg for arg in args if "search" not in arg]) == 0
    stages = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["stages"]
    assert list(stages) == ["selected_head", "head", "full"]
    assert "search" not in stages["head"]


def test_a_backbone_without_the_groups_of_a_later_stage_is_left_out(folder: Path, tmp_path: Path) -> None:
    more = (f"candidates=[{SMALLEST},timm/test_vit]", "sizes=32", "stages.full.unfreeze=[blocks.1,head]")
    assert select(arguments(folder, tmp_path / "out", *more)) == 0
    found = content(tmp_path / "out")
    assert {row["model"] for row in found["rows"]} == {"timm/test_vit"}
    assert "stages.full.unfreeze names blocks.1" in found["left_out"][f"{SMALLEST} 32 px"]


def test_images_in_the_current_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of best.yaml has a name of its own, which is no question before."""
    monkeypatch.chdir(folder)
    args = arguments(Path(), tmp_path / "out", f"candidates={SMALLEST}", "sizes=32")
    assert select(args) == 0


def test_a_folder_in_use_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells").mkdir()
    Attempt(tmp_path, LOCK).begin(0)
    signed = json.loads((tmp_path / LOCK).read_text())
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        process = lock._process(other.pid)
        (tmp_path / LOCK).write_text(json.dumps({**signed, "pid": other.pid, "process": process}))
        args = arguments(folder, tmp_path, f"candidates={SMALLEST}", "sizes=32")
        assert select(args) == 2
        assert f"is in use: process {other.pid}" in capsys.readouterr().err
    finally:
        other.communicate(b"\n")
    assert select(args) == 0
    assert "ended_at" in json.loads((tmp_path / LOCK).read_text())


def test_images_that_are_skipped_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "data")
    next((tmp_path / "data" / "train").rglob("*.png")).write_bytes(b"\x89PNG")
    args = arguments(
        tmp_path / "data", tmp_path / "out", f"candidates={SMALLEST}", "sizes=32", "data.on_bad_image=skip"
    )
    for _ in range(2):
        assert select(args) == 0
        assert "images that can't be used: 1 of train" in capsys.readouterr().out
        found = content(tmp_path / "out")
        assert found["rows"][0]["n_train"] == found["images"]["train"] - 1


def test_results_that_were_edited_are_computed_again(folder: Path, tmp_path: Path) -> None:
    args = arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=32", "heads=[ridge]")
    assert select(args) == 0
    before = without_times(content(tmp_path / "out"))
    for file, key in ((f, k) for f in (tmp_path / "out" / "cells").iterdir() for k in ("head", "n", "value")):
        tree = json.loads(file.read_text())
        if key in tree:
            file.write_text(json.dumps({**tree, key: {"top1": 1.0} if key == "head" else 0 if key == "n" else "abc"}))
            assert select(args) == 0
            assert without_times(content(tmp_path / "out")) == before


def test_the_files_are_there_while_the_estimate_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimated(*args: Any) -> None:
        assert content(tmp_path / "out")["no_estimate"] == "it was not computed yet"
        raise NoEstimateError("none")

    monkeypatch.setattr("distil_tl.cli.selection.estimate", estimated)
    assert select(arguments(folder, tmp_path / "out", f"candidates={SMALLEST}", "sizes=32")) == 0
    assert content(tmp_path / "out")["no_estimate"] == "none"


def test_a_folder_with_other_files_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    assert select(arguments(folder, tmp_path / "mine", f"candidates={SMALLEST}")) == 2
    assert "other files" in capsys.readouterr().err
