"""The grid of a selection: names, sizes, costs, the order of cells, and which results are near the best."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distil_tl.cli.select import read
from distil_tl.cli.selection import _Selection
from distil_tl.cli.selection_checks import without_models
from distil_tl.config import hints
from distil_tl.data.config import DataConfig
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.rundir import changes
from distil_tl.selection import cell_search, costs, plan
from distil_tl.selection.candidates import expand, locate, matching
from distil_tl.selection.cell_search import CellSearch, RanksDifferError
from distil_tl.selection.cells import Cell, Grid, Result, near_best, pareto
from distil_tl.selection.common import Common
from distil_tl.selection.config import LISTS, GridConfig, head_stage, read_budget
from distil_tl.selection.estimate import divide
from distil_tl.selection.plan import NEWER, _digest, _without_newer
from distil_tl.training.config import OptimConfig, SearchConfig, StageConfig
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import SMALLEST


def cell(name: str, size: int = 32, crop: str = "weights", gmacs: float = 1.0) -> Cell:
    return Cell(name, "none", size, crop, 10, int(gmacs * 1e9), digest=f"{name}{size}{crop}")


def result(cell: Cell, top1: float, loss: float = 1.0, n: int = 100) -> Result:
    head = {"lr": 0.1, "weight_decay": 0.0, "top1": top1, "loss": loss}
    return Result(cell, "none", n, head, [head], "fp32", 8, 100.0, 1.0)


# What is given.


def test_a_list_a_single_value_and_commas_are_the_same() -> None:
    for given in (["a", "b"], "a,b", "a, b", ["a", "b", "a"]):
        assert GridConfig(candidates=given).candidates == ["a", "b"]
    assert GridConfig(sizes=64).sizes == [64]
    assert GridConfig().sizes == []
    assert not list(GridConfig(sizes=[64], crops="squash").problems())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"sizes": [4]}, "sizes has 4"),
        ({"sizes": ["big"]}, "sizes has 'big'"),
        ({"crops": ["squish"]}, "squash"),
        ({"readouts": ["last5"]}, "last2"),
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": [3]}, "candidates has 3"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, object], named: str) -> None:
    (problem,) = GridConfig(**wrong).problems()
    assert named in problem


def test_a_budget_has_a_unit() -> None:
    assert [read_budget(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    for wrong in ("10", "0m", "-1m", "ten", "1d"):
        with pytest.raises(ValueError, match="10m"):
            read_budget(wrong)


def test_the_heads_are_those_of_the_first_stage_if_it_trains_the_head_alone() -> None:
    own = StageConfig(unfreeze="head", epochs=4, augment="light", image_size=64, search=SearchConfig(lr=[0.5]))
    name, stage = head_stage({"probe": own, "full": StageConfig()})
    assert (name, stage.epochs, stage.search.lr, stage.image_size) == ("probe", 4, [0.5], None)
    assert (stage.features, stage.augment) == ("on", "none")
    assert head_stage({"probe": replace(own, views=2)})[1].augment == "light"
    assert head_stage({"probe": replace(own, views=2, augment=None)}, "strong")[1].augment == "strong"
    assert head_stage({"probe": replace(own, lr="auto")})[1].lr == 3e-4, "a number, for a grid of weight decays"
    for stages in ({"full": StageConfig()}, {"head": replace(own, epochs=0)}):
        name, stage = head_stage(stages)
        assert name not in stages
        assert (stage.epochs, len(stage.search.lr) * len(stage.search.weight_decay)) == (20, 50)


def test_the_augmentation_of_later_stages_is_kept_and_checked_without_a_hint() -> None:
    """No stage of the selection has it, but best.yaml does."""
    _, config, _ = read(["data.root=x", "data.augment=strong"])
    assert list(hints(without_models(config))) == []
    assert config.data.augment == "strong"
    config.data.augment = "strng"
    assert any("data.augment is 'strng'" in problem for problem in without_models(config).data.problems())


# Names.


def test_the_models_of_the_built_in_lists_exist() -> None:
    for names in LISTS.values():
        assert [name for name in names if ModelConfig(name, "none").name_problems()] == []
        assert expand([name for name in LISTS if LISTS[name] == names]) == list(names)


def test_patterns_stand_for_models_with_weights() -> None:
    assert matching("resnet1*", pretrained=True) == ["resnet101", "resnet152", "resnet18"]
    assert "timm/tf_efficientnet_lite3" in matching("timm/tf_*lite*", pretrained=True)
    with_weights, all_ = (set(matching("timm/efficientnet_*", pretrained=yes)) for yes in (True, False))
    assert "timm/efficientnet_b8" in all_ - with_weights
    assert with_weights < all_


def test_unknown_names_are_refused_together() -> None:
    with pytest.raises(UserError, match=r"(?s)renset18.*resnet18.*nosuch\*"):
        expand(["renset18", "timm/nosuch*", "resnet18"])


def test_weights_that_are_missing_and_models_without_any_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    names = ["resnet18", "timm/efficientnet_b8"]
    found = locate(names, ModelConfig(weights="auto"))
    assert found.missing == {"resnet18": "torchvision IMAGENET1K_V1"}
    assert "no weights" in found.unusable["timm/efficientnet_b8"]
    assert [model.name for model in locate(names, ModelConfig(weights="none")).usable] == names


# The order.


def test_each_backbone_is_tried_once_before_the_best_ones_get_more() -> None:
    cells = [cell(name, size, gmacs=gmacs) for name, gmacs in (("a", 3), ("b", 1), ("c", 2)) for size in (32, 64)]
    grid = Grid(cells, "top1")
    figures = {"a": 0.5, "b": 0.3, "c": 0.9}
    order = []
    while (following := grid.following()) is not None:
        order.append((following.name, following.image_size))
        grid.results.append(result(following, figures[following.name]))
    assert order == [("b", 32), ("c", 32), ("a", 32), ("c", 64), ("a", 64), ("b", 64)]


def test_read_outs_of_the_same_passes_follow_each_other() -> None:
    cells = [
        replace(cell(name, gmacs=gmacs), readout=readout) for name, gmacs in (("a", 2), ("b", 1))
        for readout in ("pooled", "last2", "mean")
    ]  # fmt: skip
    grid, order = Grid(cells, "top1"), list[str]()
    while (following := grid.following()) is not None:
        order.append(f"{following.name} {following.readout}")
        grid.results.append(result(following, 0.5))
    assert order == ["b pooled", "b last2", "b mean", "a pooled", "a last2", "a mean"]
    assert grid.cells[1].title == "a 32 px weights last2"


def test_a_network_that_fails_is_left_out_with_every_crop_of_its_size() -> None:
    cells = [cell("a", size, crop) for size in (32, 64) for crop in ("weights", "squash")]
    grid = Grid(cells, "top1")
    grid.fail(cells[0], "no")
    assert grid.left == cells[2:]
    assert grid.following() == cells[2]


def test_a_cell_whose_heads_fail_leaves_the_other_crops_and_read_outs() -> None:
    cells = [replace(cell("a", 32, crop), readout=readout) for crop in ("weights", "squash") for readout in "xy"]
    grid = Grid(cells, "top1")
    grid.results.append(result(cells[0], 0.5))
    grid.failed_heads[cells[1], "linear"] = "no memory"
    assert grid.left == cells[2:]
    assert grid.complete == 1, "what failed is not saved"
    assert grid.reasons() == {"a 32 px weights y, linear head": "no memory"}


def test_the_best_is_ahead_by_its_figure_then_its_loss_then_its_cost() -> None:
    rows = [
        result(cell("dear", gmacs=3), 0.8, 0.5), result(cell("cheap", gmacs=1), 0.8, 0.5),
        result(cell("sure", gmacs=9), 0.8, 0.4), result(cell("bad", gmacs=0.5), 0.2),
    ]  # fmt: skip
    grid = Grid([each.cell for each in rows], "top1", rows)
    ranked = grid.ranked()
    assert [each.cell.name for each in ranked] == ["sure", "cheap", "dear", "bad"]
    assert [each.cell.name for each in pareto(ranked)] == ["sure", "cheap", "bad"]


def unknown(name: str) -> Cell:
    return replace(cell(name), multiply_adds=None)


def test_unknown_multiply_adds_are_last_and_spend_no_budget() -> None:
    grid = Grid([unknown("a"), cell("b", gmacs=2), cell("c", gmacs=1)], "top1")
    assert grid.following() == grid.cells[2]
    info = DistInfo(Launch(), torch.device("cpu"), 60)

    def fits(timed: Cell, following: Cell) -> bool:
        known: Any = SimpleNamespace(timed=[(timed, 1.0)], began=time.monotonic(), info=info)
        return _Selection.fits(known, following, 100.0)

    for pair in ((unknown("a"), cell("b")), (cell("b"), unknown("a")), (cell("b"), cell("c", gmacs=9))):
        assert fits(*pair)
    assert not fits(cell("b"), cell("c", gmacs=999))


# Ranks and memory.


@pytest.mark.parametrize(
    ("other", "error"), [("no weights", UserError), (None, RanksDifferError), ("no disk", RanksDifferError)]
)
def test_a_network_is_unfit_only_if_all_ranks_say_so(
    monkeypatch: pytest.MonkeyPatch, other: str | None, error: type[UserError]
) -> None:
    def build(*args: object, **kwargs: object) -> None:
        raise UserError("no weights")

    monkeypatch.setattr(cell_search, "build", build)
    monkeypatch.setattr(cell_search, "gather_objects", lambda info, own: [own, ["node2", other]])
    common: Any = SimpleNamespace(data=SimpleNamespace(on_bad_image="error"), model_of=lambda cell: None, seed=0)
    nothing: Any = SimpleNamespace(classes=[])
    search = CellSearch(nothing, common, nothing, nothing)
    with pytest.raises(UserError, match="no weights") as caught:
        search._built(cell("a"))
    assert type(caught.value) is error
    assert ("rank 1 on node2" in str(caught.value)) == (other == "no disk")


def test_the_speed_is_measured_with_fewer_images_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    limit = 0

    def prefix(images: torch.Tensor) -> None:
        sizes.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError("none left")

    info = DistInfo(Launch(), torch.device("cpu"), 60)
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    for limit, passed in ((2, [8, 4, 2, 2, 2]), (0, [8, 4, 2, 1])):
        sizes.clear()
        speed = costs.images_per_second(info, prefix, 8)  # type: ignore[arg-type]
        assert sizes == passed
        assert (speed is None) == (limit == 0)


def test_results_depend_on_the_rounding_of_the_device() -> None:
    model = ModelConfig("resnet18", "none")
    with torch.device("meta"):
        network = build(model, 2, image_size=32, seed=0, pretrained=False)
    common = Common(
        "head", StageConfig(), model, DataConfig(), OptimConfig(), "top1", "fp32", 0, tf32=True, deterministic=False
    )
    settings = (common, replace(common, tf32=False), replace(common, deterministic=True))
    splits: Any = SimpleNamespace(as_dict=dict)
    assert len({_digest(cell("resnet18"), each, splits, network, "cpu") for each in settings}) == 3


def test_new_keys_leave_the_results_of_earlier_versions() -> None:
    """At the value for the behaviour before they are no part of a digest."""
    before = asdict(StageConfig(epochs=4))
    assert before.pop("head") == "linear"
    assert _without_newer("stage", asdict(StageConfig(epochs=4))) == before
    assert _without_newer("stage", asdict(StageConfig(head="lda")))["head"] == "lda"
    assert "readout" not in _without_newer("model", asdict(ModelConfig()))
    assert _without_newer("model", asdict(ModelConfig(readout="last2")))["readout"] == "last2"
    assert all(changes.NEW_KEYS[key.replace("stage.", "stages.*.")] == value for key, value in NEWER.items())


def test_near_the_best_is_within_its_interval() -> None:
    rows = [result(cell("a"), 0.8), result(cell("b"), 0.72), result(cell("c"), 0.70)]
    low, high = rows[0].interval("top1") or (0, 0)
    assert low == pytest.approx(0.7112, abs=1e-3)
    assert high == pytest.approx(0.8666, abs=1e-3)
    assert [each.cell.name for each in near_best(rows, "top1")] == ["a", "b"]
    assert rows[0].interval("loss") is None
    assert near_best(rows, "loss") == rows[:1]
    rows = [
        replace(row, head={"loss": loss}, other_interval=(0.7, 1.3))
        for row, loss in zip(rows, (1, 1.2, 1.4), strict=True)
    ]
    assert near_best(rows, "loss") == rows[:2]


def test_folds_are_equal_in_size_and_in_classes() -> None:
    targets = np.repeat([0, 1, 2], [50, 23, 4])
    fold = divide(targets, 5, 0)
    assert sorted(np.bincount(fold)) == [15, 15, 15, 16, 16]
    for target, size in enumerate((50, 23, 4)):
        counts = np.bincount(fold[targets == target], minlength=5)
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == size
    assert (divide(targets, 5, 0) == fold).all()
    assert (divide(targets, 5, 1) != fold).any()


def test_a_network_whose_operations_were_counted_needs_no_other_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: TransferModel, size: int, key: str) -> None:
        raise UserError(f"{key}={size} does not fit")

    monkeypatch.setattr(TransferModel, "try_size", fails)
    model = ModelConfig(SMALLEST, "none")
    with torch.device("meta"):
        found, reasons = plan._networks(model, 32, ["pooled"], 3, {})
    assert found["pooled"].macs
    assert not reasons
    monkeypatch.setattr(plan, "count_macs", lambda module, size: None)
    with torch.device("meta"):
        assert plan._networks(model, 32, ["pooled"], 3, {}) == ({}, {"": "sizes=32 does not fit"})


def test_results_of_a_network_of_ones_own_depend_on_the_weights_that_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, classes)

    def forward(self, images):
        return self.fc(self.body(images).mean((2, 3)))

def build(num_classes, *, pretrained=False):
    net = Net(num_classes)
    if pretrained:
        net.body.weight.data.fill_(VALUE)
    return net

VALUE = 0.5
"""
    (tmp_path / "mine_with_weights.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = ModelConfig("mine_with_weights:build", "auto")
    first, again = (plan._own_digest(model, 16, 2, "pooled") for _ in range(2))
    assert first == again
    monkeypatch.setattr(importlib.import_module("mine_with_weights"), "VALUE", 0.75)
    assert plan._own_digest(model, 16, 2, "pooled") != first
    monkeypatch.undo()
    with (tmp_path / "mine_with_weights.py").open("a") as file:
        file.write("# changed\n")
    assert plan._own_digest(model, 16, 2, "pooled") != first
    assert plan._own_digest(replace(model, weights="none"), 16, 2, "pooled") is None
