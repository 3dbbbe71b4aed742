"""`stages.NAME.head`: a stage that fits its head is one of a run like any other, on any number of ranks and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distil_tl import train as train_module
from distil_tl.config import check, load
from distil_tl.train import main
from distil_tl.training.heads.config import FITTED_HEADS
from distil_tl.training.heads.rows import Rows
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import head_args
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import summary_of
from tests.helpers.same_run import timeless


def fit_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = summary_of(run_dir)["stages"]["head"]["fit"]
    return {key: value for key, value in found.items() if key != "seconds"}


def weights(run_dir: Path, checkpoint: str = "last") -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(run_dir / "checkpoints" / checkpoint / "weights.safetensors")
    return found


def one(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """The head stage alone. It has 3 epochs, which count as one."""
    return head_args(folder, run_dir, "stages.full.epochs=0", *more)


@pytest.mark.parametrize("kind", FITTED_HEADS)
def test_the_fitted_head_is_evaluated_and_in_the_checkpoint(folder: Path, tmp_path: Path, kind: str) -> None:
    assert main(one(folder, tmp_path / "run", f"stages.head.head={kind}")) == 0
    summary, fit = summary_of(tmp_path / "run"), fit_of(tmp_path / "run")
    assert (fit["head"], summary["stages"]["head"]["epochs"]) == (kind, 1)
    assert fit["top1"] == max(head["top1"] for head in fit["heads"])
    final = summary["final"]
    assert final["top1"] == fit["top1"]
    assert final["loss"] == pytest.approx(fit["loss"], rel=1e-4)
    stage = summary["stages"]["head"]
    assert stage["train_images"] == 52
    assert stage["seconds"] >= stage["train_seconds"] >= stage["fit"]["seconds"] > 0
    trained, judged = lines(tmp_path / "run")
    assert (trained["split"], trained["n"], trained["lr"], trained["step"]) == ("train", 52, 0.0, 1)
    assert judged["top1"] == final["top1"]
    assert "<h2>Fitted heads" in (tmp_path / "run" / "report.html").read_text()


def fitted(args: list[str]) -> int:
    torch.set_num_threads(1)
    return train(args)


def test_the_same_bits_on_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    for world in (1, 2, 4):
        more = ("stages.head.head=logistic", "data.balance=weights", "optim.label_smoothing=0.1", "precision=fp32")
        assert run_ranks(world, fitted, one(folder, tmp_path / str(world), *more)) == [0] * world
    first, second, fourth = (fit_of(tmp_path / str(world)) for world in (1, 2, 4))
    assert first == second == fourth
    heads = [weights(tmp_path / str(world)) for world in (1, 2, 4)]
    for name, tensor in heads[0].items():
        assert torch.equal(tensor, heads[1][name])
        assert torch.equal(tensor, heads[2][name])


def stopped(args: list[str], number: int, call: int) -> int:
    """A signal to the last rank in one of its sums over the rows."""
    original, calls = Rows.total, list[int]()

    def total(self: Rows, shape: tuple[int, ...], of: Any) -> Tensor:
        calls.append(1)
        if len(calls) == call and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return original(self, shape, of)

    Rows.total = total  # type: ignore[method-assign]
    return fitted(args)


def test_a_fit_that_was_stopped_or_killed_is_done_again(folder: Path, tmp_path: Path) -> None:
    settings = ("stages.head.head=logistic", "precision=fp32")
    assert run_ranks(2, fitted, one(folder, tmp_path / "whole", *settings)) == [0, 0]
    args = one(folder, tmp_path / "run", *settings)
    assert run_ranks(2, stopped, args, 15, 6) == [3, 3]
    assert summary_of(tmp_path / "run")["status"] == "preempted"
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, stopped, args, 9, 6)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert run_ranks(2, fitted, args) == [0, 0]
    assert timeless(lines(tmp_path / "run")) == timeless(lines(tmp_path / "whole"))
    assert fit_of(tmp_path / "run") == fit_of(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(tmp_path / "whole")[name])


def test_a_run_that_is_stopped_after_the_fit_does_not_repeat_it_and_the_next_stage_starts_from_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("stages.head.head=ridge", "precision=fp32", "stages.full.lr=1e-9", "checkpoint.keep=9")
    assert main(head_args(folder, tmp_path / "whole", *settings)) == 0
    args = head_args(folder, tmp_path / "run", *settings)
    original = train_module.train_one_epoch

    def stop(*rest: Any) -> None:
        os.kill(os.getpid(), 15)
        original(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_one_epoch", stop)
        assert main(args) == 3
    monkeypatch.setattr(train_module, "fit_head", None)
    assert main([*args, "stages.head.head=lda"]) == 2, "the head of a stage that has begun"
    assert "stages.head.head: was" in capsys.readouterr().err
    assert main(args) == 0
    assert timeless(lines(tmp_path / "run")) == timeless(lines(tmp_path / "whole"))
    assert fit_of(tmp_path / "run") == fit_of(tmp_path / "whole")
    first, after = weights(tmp_path / "run", "step-00000001"), weights(tmp_path / "run")
    (name,) = (name for name, tensor in after.items() if tensor.ndim == 2 and len(tensor) == 3)
    assert torch.allclose(after[name], first[name], atol=1e-6), "steps of 1e-9 change nothing"
    assert float(after[name].abs().max()) > 1e-3


def test_classes_drawn_equally_often_are_weights_of_a_fit(folder: Path, tmp_path: Path) -> None:
    kept = []
    for balance in ("none", "weights", "sampler"):
        run_dir = tmp_path / balance
        more = ("stages.head.head=ridge", f"data.balance={balance}")
        assert main(one(folder, run_dir, *more)) == 0
        kept.append(np.array([head["loss"] for head in fit_of(run_dir)["heads"]]))
    assert not np.allclose(kept[0], kept[1], rtol=1e-4)
    np.testing.assert_allclose(kept[1], kept[2], rtol=1e-5)


# Refusals.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stages.head.head=rigde"], "stages.head.head is 'rigde'; choose one of linear, logistic, ridge, lda"),
        (
            ["stages.head.head=ridge", "stages.head.augment=light"],
            "is fitted to features: set stages.head.features=on (or stages.head.augment=none), or use",
        ),
        (
            ["stages.full.head=ridge"],
            "stages.full.head=ridge is fitted to features: set stages.full.unfreeze=head, or use",
        ),
        (["stages.head.head=lda", "stages.head.features=off"], "is fitted to features"),
        (["stages.head.head=lda", "data.balance=logit_adjust"], "has no effect on stages.head.head=lda"),
        (
            ["stages.head.head=lda", "stages.head.views=2", "stages.head.mixup=0.2", "stages.head.ema=0.9"],
            "remove stages.head.mixup, stages.head.views, stages.head.ema, or use stages.head.head=linear",
        ),
        (["stages.head.head=ridge", "stages.head.search.lr=[0.1]"], "remove stages.head.search"),
    ],
)
def test_what_does_not_go_with_a_fit_is_refused_at_once(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(load(["data.augment=none", *args])[0], 1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.name=squeezenet1_1"], "stages.head.head: the stage trains something other than a single linear layer"),
        ([], "stages.head.head=ridge needs features: they can't be written"),
    ],
)
def test_a_model_that_cannot_have_a_fitted_head_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str],
    message: str,
) -> None:  # fmt: skip
    if not more:
        monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
        (tmp_path / "cache").write_text("a file in its place")
    assert main(one(folder, tmp_path / "run", "data.image_size=64", "stages.head.head=ridge", *more)) == 2
    assert message in capsys.readouterr().err
