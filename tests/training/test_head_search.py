"""Head search: the heads equal those that the stage would train one by one, and the best is chosen."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from distil_tl import train as train_module
from distil_tl.config import check, load
from distil_tl.models.transfer import TransferModel, build
from distil_tl.train import main
from distil_tl.training import head_search as module
from distil_tl.training.batched_heads import BatchedHeads, HeadBatch, HeadSettings
from distil_tl.training.config import OptimConfig, SearchConfig, StageConfig, rank_by
from distil_tl.training.head_choice import choose_head, how_chosen
from distil_tl.training.head_search import grid
from distil_tl.training.losses import training_loss
from distil_tl.training.optim import clip_gradients
from distil_tl.training.stage import Stage
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import head_args
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import losses, summary_of
from tests.helpers.same_run import timeless

CPU = torch.device("cpu")
GRID = ("stages.head.search.lr=[1,0.3,0.03]", "stages.head.search.weight_decay=[2,0.3]", "optim.name=adamw")


def found(run_dir: Path) -> dict[str, Any]:
    """The result of the search of the head stage, without its time."""
    record: dict[str, Any] = summary_of(run_dir)["stages"]["head"]["search"]
    return {key: value for key, value in record.items() if key != "seconds"}


def one(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """Arguments of the head stage alone."""
    return head_args(folder, run_dir, "stages.full.epochs=0", *more)


# The same training.


@pytest.mark.parametrize(
    ("optim", "by_head"),
    [
        (OptimConfig(), True),
        (OptimConfig(), False),  # as on a GPU
        (OptimConfig(clip_norm=None, label_smoothing=0.1), True),
        (OptimConfig(name="sgd", clip_norm=0.3), True),
        (OptimConfig(name="sgd", momentum=0.0, clip_norm=None), True),
        (OptimConfig(loss="focal"), True),
    ],
)
@pytest.mark.parametrize("balance", ["none", "effective_number", "logit_adjust"])
@pytest.mark.parametrize("bias", [True, False])
def test_each_head_is_what_the_optimizer_makes_of_it(
    optim: OptimConfig, by_head: bool, balance: str, bias: bool
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(12, 5, bias=bias)
    settings = [HeadSettings(0.1, 0.0), HeadSettings(0.03, 0.7), HeadSettings(1e-4, 0.01)]
    loss = training_loss(optim, balance, np.array([900, 300, 100, 30, 10]), CPU)
    heads = BatchedHeads(head, settings, optim, CPU, loss)
    heads._by_head = by_head
    singles = [nn.Linear(12, 5, bias=bias) for _ in settings]
    optimizers = []
    for single, (lr, decay) in zip(singles, settings, strict=True):
        single.load_state_dict(head.state_dict())
        groups = [{"params": [p], "weight_decay": decay if p.ndim > 1 else 0.0} for p in single.parameters()]
        optimizers.append(
            torch.optim.SGD(groups, lr, momentum=optim.momentum, nesterov=optim.momentum > 0)
            if optim.name == "sgd"
            else torch.optim.AdamW(groups, lr)
        )
    for number in range(25):
        features, targets, valid = 3 * torch.randn(8, 12), torch.randint(0, 5, (8,)), torch.rand(8) > 0.2
        factor = 1 / (1 + number)
        for single, optimizer, (lr, _) in zip(singles, optimizers, settings, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            each = loss(single(features), targets)
            optimizer.zero_grad()
            (each * valid).sum().div(8).backward()  # type: ignore[no-untyped-call]
            clip_gradients(optimizer, optim.clip_norm)
            optimizer.step()
        smoothed = F.one_hot(targets, 5) * (1 - optim.label_smoothing) + optim.label_smoothing / 5
        with torch.no_grad():
            shares = loss.weighted(valid / 8, targets)
            heads.step(HeadBatch(F.pad(features, (0, int(bias)), value=1.0), smoothed, shares, factor))
        for single, weight in zip(singles, heads.weight, strict=True):
            torch.testing.assert_close(weight[:, :12], single.weight, rtol=0, atol=1e-5)
            if bias:
                torch.testing.assert_close(weight[:, 12], single.bias, rtol=0, atol=1e-5)
    assert heads.finite.all()


def _state(heads: BatchedHeads) -> tuple[torch.Tensor, ...]:
    return heads.weight, heads._gradient, heads._first, heads._second


def test_a_head_takes_the_same_step_alone_and_beside_others_and_diverged_ones_are_found() -> None:
    torch.manual_seed(0)
    head, settings = nn.Linear(64, 8), [HeadSettings(0.1, 0.3), HeadSettings(1e38, 0.0), HeadSettings(0.003, 1.0)]
    together = BatchedHeads(head, settings, OptimConfig(), CPU)
    alone = [BatchedHeads(head, [each], OptimConfig(), CPU) for each in settings]
    targets, shares = F.one_hot(torch.arange(32) % 8).float(), torch.full((32,), 1 / 32)
    for _ in range(3):
        batch = HeadBatch(F.pad(torch.randn(32, 64), (0, 1), value=1.0), targets, shares, 0.5)
        for heads in (together, *alone):
            heads.step(batch)
    assert together.finite.tolist() == [True, False, True]
    for number in (0, 2):
        torch.testing.assert_close(alone[number].weight[0], together.weight[number], rtol=0, atol=1e-5)
        for mine, other in zip(_state(alone[number]), _state(together), strict=True):
            mine[0] = other[number]  # without the rounding of products of other shapes
    for heads in (together, *alone):
        heads._adamw_by_head(0.5)
    for number in (0, 2):
        assert torch.equal(alone[number].weight[0], together.weight[number])


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_head_of_the_search_is_the_one_that_the_stage_trains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, dropout: bool
) -> None:
    """Images are left out in both splits."""
    data = shutil.copytree(folder, tmp_path / "data")
    for path in [*sorted((data / "train" / "noise").iterdir())[:2], next((data / "val" / "noise").iterdir())]:
        path.write_bytes(b"broken")
    trained: list[BatchedHeads] = []
    original = module._score_heads

    def scores(search: Any, groups: Any, agreement: Any) -> Any:
        trained.extend(groups.heads)
        return original(search, groups, agreement)

    def with_dropout(*args: Any, **settings: Any) -> TransferModel:
        model = build(*args, **settings)
        model.module.fc = nn.Sequential(nn.Dropout(0.3), model.module.get_submodule("fc"))
        return dataclasses.replace(model)

    monkeypatch.setattr(module, "_score_heads", scores)
    if dropout:
        monkeypatch.setattr(train_module, "build", with_dropout)
    separates = "model.name=resnet18"  # the classes, by the features of random weights
    args = one(data, tmp_path / "run", separates, f"optim.name={optim}", "data.on_bad_image=skip")
    loss = ["optim.loss=focal", "data.balance=sampler"] if dropout else ["optim.label_smoothing=0.1"]
    more = ["stages.head.views=2", "metric=balanced_accuracy", *loss]
    assert main([*args, "stages.head.search.lr=[0.1]", *more]) == 0
    weights = load_file(tmp_path / "run" / "checkpoints" / "last" / "weights.safetensors")
    (weight,) = (value for key, value in weights.items() if value.ndim == 2 and len(value) == 3)
    torch.testing.assert_close(trained[0].weight[0, :, :-1], weight, rtol=0, atol=1e-5)
    (head,) = found(tmp_path / "run")["heads"]
    final = summary_of(tmp_path / "run")["final"]
    figures = {name: final[name] for name in ("top1", "balanced_accuracy")}
    assert head == {"lr": 0.1, "weight_decay": 0.01, "loss": pytest.approx(final["loss"], 1e-5), **figures}
    assert final["top1"] > 0.4, "it has learned something"


def test_the_choice_is_that_of_separate_trainings(folder: Path, tmp_path: Path) -> None:
    assert main(one(folder, tmp_path / "run", *GRID)) == 0
    record, best = found(tmp_path / "run"), []
    for head in record["heads"]:
        lr, decay = head["lr"], head["weight_decay"]
        run_dir = tmp_path / f"{lr}-{decay}"
        optim = ("optim.name=adamw", f"optim.weight_decay={decay}")
        assert main(one(folder, run_dir, f"stages.head.lr={lr}", *optim)) == 0
        final = summary_of(run_dir)["final"]
        assert head["top1"] == final["top1"]
        assert head["loss"] == pytest.approx(final["loss"], rel=1e-4)
        best.append((-final["top1"], final["loss"], run_dir))
    assert [(head["lr"], head["weight_decay"]) for head in record["heads"]] == [
        (lr, decay) for lr in (1.0, 0.3, 0.03) for decay in (2.0, 0.3)
    ]
    assert len({head["top1"] for head in record["heads"]}) > 2, "the heads differ"
    chosen = min(best)[2]
    assert chosen.name == f"{record['lr']}-{record['weight_decay']}"
    assert losses(tmp_path / "run") == losses(chosen), "and the stage is trained with it"
    assert "<h2>Head search" in (tmp_path / "run" / "report.html").read_text()


def test_ties_are_decided_by_loss_and_then_by_order() -> None:
    rows = [
        {"top1": 0.5, "loss": 0.1},
        {"top1": 0.9, "loss": 0.3},
        {"top1": 0.9, "loss": 0.2},
        {"top1": 0.9, "loss": 0.2},
    ]
    assert rows.index(min(rows, key=partial(rank_by, "top1"))) == 2
    assert rows.index(min(rows, key=partial(rank_by, "loss"))) == 0
    assert rank_by("loss", {"loss": 0.5}) < rank_by("loss", {"loss": float("nan")})
    assert rank_by("top1", {"top1": 0.1, "loss": 0.5}) < rank_by("top1", {"top1": float("nan"), "loss": 0.1})


def test_pieces_do_not_depend_on_the_ranks_and_cover_all() -> None:
    for heads, size in ((1, 10**9), (50, 12_810), (7, 150_000), (300, 30)):
        parts = [list(range(heads)[part]) for part in module._groups(heads, size, CPU)]
        assert [i for part in parts for i in part] == list(range(heads))
        assert all(len(part) == 1 or len(part) * size <= module.GROUP_SIZE["cpu"] + size for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_values_that_are_not_searched_come_from_the_stage() -> None:
    config = StageConfig(lr=0.5, search=SearchConfig(weight_decay=[0.0, 0.1]))
    assert grid(Stage("head", config, OptimConfig(), 32, "none", 0, "fp32", "none")) == [(0.5, 0.0), (0.5, 0.1)]
    config, optim = StageConfig(lr=0.5, search=SearchConfig(lr=[0.1, 0.2])), OptimConfig(weight_decay=0.3)
    assert grid(Stage("head", config, optim, 32, "none", 0, "fp32", "none")) == [(0.1, 0.3), (0.2, 0.3)]
    assert not SearchConfig().wanted


# Ranks, and resuming.


def in_pieces(args: list[str]) -> int:
    module.GROUP_SIZE["cpu"] = 600  # two heads of 97 weights for each of three classes
    return train(args)


def test_the_choice_does_not_depend_on_the_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    for world in (1, 2, 3):
        args = one(folder, tmp_path / str(world), *GRID, "data.global_batch_size=12")
        assert run_ranks(world, in_pieces, args) == [0] * world
    assert found(tmp_path / "1") == found(tmp_path / "2") == found(tmp_path / "3")


def interrupted(args: list[str], number: int, step: int) -> int:
    """A signal to the last rank in the middle of the search."""
    original = BatchedHeads.step
    calls = []

    def counted(self: BatchedHeads, batch: HeadBatch) -> None:
        calls.append(1)
        if len(calls) == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        original(self, batch)

    BatchedHeads.step = counted  # type: ignore[method-assign]
    return in_pieces(args)


def test_a_search_that_was_stopped_or_killed_is_done_again(folder: Path, tmp_path: Path) -> None:
    assert run_ranks(2, in_pieces, one(folder, tmp_path / "whole", *GRID)) == [0, 0]
    args = one(folder, tmp_path / "run", *GRID)
    assert run_ranks(2, interrupted, args, 15, 5) == [3, 3]
    assert summary_of(tmp_path / "run")["status"] == "preempted"
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, interrupted, args, 9, 5)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert run_ranks(1, in_pieces, args) == [0]
    assert found(tmp_path / "run") == found(tmp_path / "whole")


def test_a_resumed_run_keeps_its_choice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("stages.head.lr=auto", *GRID)
    assert main(head_args(folder, tmp_path / "whole", *settings)) == 0
    args = head_args(folder, tmp_path / "run", *settings)
    original = torch.optim.AdamW.step
    steps: list[int] = []

    def step(self: torch.optim.AdamW, *rest: Any) -> Any:
        steps.append(1)
        if len(steps) == 9:
            os.kill(os.getpid(), 15)
        return original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert main(args) == 3
    monkeypatch.setattr(train_module, "search_head", None)
    assert main([*args[:-2], "stages.head.search.lr=[0.3]"]) == 2, "the grid of a stage that has begun"
    assert "stages.head.search.lr: was" in capsys.readouterr().err
    assert main(args) == 0
    assert timeless(lines(tmp_path / "run")) == timeless(lines(tmp_path / "whole"))
    assert found(tmp_path / "run") == found(tmp_path / "whole")
    assert summary_of(tmp_path / "run")["stages"]["head"]["lr"] == 3e-4, "what auto is, not what is searched"


def test_regularized_is_the_most_regularized_within_one_standard_error() -> None:
    def head(lr: float, decay: float, top1: float | None, loss: float | None = 1.0) -> dict[str, Any]:
        return {"lr": lr, "weight_decay": decay, "top1": top1, "loss": loss}

    best = head(0.1, 0.01, 0.80)  # of 400 images: its standard error is 0.02
    heads = [best, head(0.3, 1.0, 0.7799), head(0.1, 0.5, 0.7801), head(0.01, 0.5, 0.79), head(0.1, 5.0, None, None)]
    chosen = choose_head(heads, "top1", "regularized", 400)
    assert chosen == {**heads[3], "prefer": "regularized", "standard_error": pytest.approx(0.02), "near": 3,
                      "best": best}  # fmt: skip
    assert choose_head(heads, "top1", "best", 400) == best
    assert choose_head([head(0.1, 0.0, 1.0), head(0.1, 1.0, 1.0)], "top1", "regularized", 400) == {
        **head(0.1, 1.0, 1.0), "prefer": "regularized", "standard_error": 0.0, "near": 2, "best": head(0.1, 0.0, 1.0)
    }  # fmt: skip
    assert choose_head(heads[4:], "top1", "regularized", 400) is None
    assert how_chosen(chosen, "top1") == (
        "3 are within one standard error (0.0200) of the best, lr 0.1 with weight decay 0.01, top-1 0.8000; the most "
        "regularized is lr 0.01 with weight decay 0.5, top-1 0.7900 on val"
    )


def test_the_regularized_choice_is_the_same_on_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    args = [*GRID, "stages.head.search.prefer=regularized"]
    assert main(one(folder, tmp_path / "1", *args)) == 0
    assert run_ranks(2, train, one(folder, tmp_path / "2", *args)) == [0, 0]
    record = found(tmp_path / "1")
    images = len(list((folder / "val").rglob("*.png")))
    assert record["standard_error"] == math.sqrt(record["best"]["top1"] * (1 - record["best"]["top1"]) / images)
    assert record["near"] > 1
    assert record["weight_decay"] == max(
        head["weight_decay"]
        for head in record["heads"]
        if head["top1"] >= record["best"]["top1"] - record["standard_error"]
    )
    again = found(tmp_path / "2")
    assert [again[key] for key in ("lr", "weight_decay", "near", "top1")] == [
        record[key] for key in ("lr", "weight_decay", "near", "top1")
    ]
    assert summary_of(tmp_path / "1")["final"]["top1"] == record["top1"], "the stage trains with the chosen head"


# Faults and refusals.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stages.head.search.lr=[0.1,-1]"], "stages.head.search.lr must hold positive numbers"),
        (["stages.head.search.weight_decay=[-1]"], "stages.head.search.weight_decay must hold numbers of 0 or more"),
        (["stages.full.search.lr=[0.1]"], "stages.full.search needs a stage that trains on features"),
        (
            ["stages.head.search.lr=[0.1]", "stages.head.augment=light"],
            "set unfreeze=head, and augment=none, features=on or views=N where images are augmented",
        ),
        (
            [
                "stages.head.search.lr=[0.1]",
                "data.augment=none",
                "metric=loss",
                "stages.head.search.prefer=regularized",
            ],
            "stages.head.search.prefer=regularized compares shares of images",
        ),
        (["stages.full.search.prefer=most"], "stages.full.search.prefer is 'most'; choose one of best, regularized"),
        (
            ["stages.head.search.lr=[0.1]", "stages.head.features=off"],
            "stages.head.search needs a stage that trains on",
        ),
    ],
)
def test_an_invalid_search_is_refused_at_once(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(load(args)[0], 1)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["lr=0.1", "lr=[a]", "rate=[0.1]"])
def test_a_malformed_search_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"stages\.head\.search"):
        load([f"stages.head.search.{value}"])


def test_a_stage_with_epochs_0_may_keep_its_search() -> None:
    check(load(["stages.full.search.lr=[0.1]", "stages.full.epochs=0"])[0], 1)
    assert load(["stages.head.search.lr=[1e-3,1e-2]"])[0].stages["head"].search.lr == [0.001, 0.01]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["model.name=squeezenet1_1"],
            "stages.head.search: the stage trains something other than a single linear layer",
        ),
        (["stages.head.unfreeze=2"], "stages.head.search: the stage trains something other than a single linear layer"),
        ([], "stages.head.search needs features: they can't be written"),
    ],
)
def test_a_stage_without_such_a_head_or_features_is_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    if not more:
        monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
        (tmp_path / "cache").write_text("a file in its place")
    assert main(one(folder, tmp_path / "run", "data.image_size=64", *GRID, *more)) == 2
    assert message in capsys.readouterr().err


def test_diverged_heads_are_not_chosen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unclipped = "optim.clip_norm=null"
    args = one(folder, tmp_path / "some", "stages.head.search.lr=[1e38,0.01]", unclipped)
    assert main(args) == 0
    record = found(tmp_path / "some")
    assert record["lr"] == 0.01
    assert record["heads"][0] == {"lr": 1e38, "weight_decay": 0.01, "top1": None, "loss": None}
    assert main(one(folder, tmp_path / "all", "stages.head.search.lr=[1e38,1e37]", unclipped)) == 1
    assert "none of the 2 heads of stages.head.search has a finite loss" in capsys.readouterr().err
    assert json.loads((tmp_path / "all" / "summary.json").read_text())["status"] == "failed"
