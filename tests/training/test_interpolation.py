"""WiSE-FT: interpolated weights, the choice of alpha, and runs that end with it."""

from __future__ import annotations

import importlib
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distil_tl
from distil_tl.training.averaging import trained_tensors
from distil_tl.training.config import StageConfig
from distil_tl.training.interpolation import ALPHAS, Interpolation, best_alpha
from distil_tl.training.stage import apply_stage
from tests.helpers.chaos import attempt
from tests.helpers.networks import tiny
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import evaluated, same_result, summary_of

finish_module: Any = importlib.import_module("distil_tl.finish")


def figures(top1: float, loss: float = 1.0) -> dict[str, float]:
    return {"top1": top1, "loss": loss}


def test_weights_lie_on_the_line_and_at_its_ends() -> None:
    model = tiny()
    apply_stage(model, StageConfig(unfreeze="head"))
    weight = model.module.get_parameter("head.weight")
    first, frozen = weight.detach().clone(), model.module.get_parameter("stem.conv.weight").detach().clone()
    line = Interpolation(trained_tensors(model.module))
    best = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    for values, found in ((best, figures(0.6)), (torch.zeros_like(best), figures(0.5)), (first, figures(0.6))):
        weight.data.copy_(values)
        line.offer(found, "top1", preferred=False)
    again = Interpolation(trained_tensors(model.module))
    again.load_state(line.state())
    for alpha in (1.0, 0.3, 0.0):
        again.apply(alpha)
        assert torch.allclose(weight, (1 - alpha) * first + alpha * best, atol=1e-6)
        assert alpha != 1.0 or torch.equal(weight, best)
        assert alpha != 0.0 or torch.equal(weight, first)
    assert torch.equal(model.module.get_parameter("stem.conv.weight"), frozen)
    assert again.figures == figures(0.6)
    weight.data.copy_(torch.ones_like(best))
    again.offer(figures(0.5), "top1", preferred=True)
    again.apply(1.0)
    assert torch.equal(weight, torch.ones_like(best))
    assert again.figures == figures(0.5)


def test_the_best_alpha_and_of_equal_ones_the_nearest_to_1() -> None:
    assert ALPHAS == (1.0, 0.8, 0.6, 0.4, 0.2)
    assert best_alpha("top1", {1.0: figures(0.5), 0.7: figures(0.6), 0.5: figures(0.6, 0.1)}) == 0.7
    assert best_alpha("loss", {1.0: figures(0.5), 0.7: figures(0.6), 0.5: figures(0.6, 0.1)}) == 0.5
    assert best_alpha("top1", {1.0: figures(0.5), 0.9: figures(float("nan"))}) == 1.0


# A learning rate that is much too high: weights closer to the start are better.
WISE = ["stages.full.wise_ft=true", "stages.full.lr=3", "optim.clip_norm=null", "metric=loss", "stages.full.epochs=2"]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.arguments import small_args

    run_dir = tmp_path_factory.mktemp("wise") / "run"
    after = ["stages.full.ema=0.5", f"run_dir={run_dir}"]
    assert train([*small_args(folder), *WISE, *after]) == 0
    return run_dir


def test_a_run_ends_with_the_alpha_that_is_best_on_val(finished: Path, tmp_path: Path) -> None:
    summary = summary_of(finished)
    result, final = summary["stages"]["full"]["wise_ft"], summary["final"]
    by_alpha = {row["alpha"]: row["loss"] for row in result["figures"]}
    assert list(by_alpha) == list(ALPHAS)
    assert by_alpha[1.0] == min(line["loss"] for line in lines(finished, split="val", stage="full"))
    assert result["alpha"] == final["alpha"] == min(by_alpha, key=by_alpha.__getitem__) < 1
    assert final["loss"] == by_alpha[result["alpha"]]
    assert summary["stages"]["head"]["wise_ft"] is None
    assert "Interpolated weights" in (finished / "report.html").read_text()

    assert evaluated([str(finished), "--checkpoint", "last", "--json", str(tmp_path / "last.json")]) == 0
    assert json.loads((tmp_path / "last.json").read_text())["loss"] == pytest.approx(final["loss"], rel=1e-5)
    best = json.loads((finished / "evaluation.json").read_text())
    assert best["loss"] == pytest.approx(summary["best"]["loss"], rel=1e-5)
    if summary["best"] == final:  # what `distil_tl.load` gives
        weights = load_file(finished / "checkpoints" / "last" / "weights.safetensors")
        loaded = distil_tl.load(finished).model.state_dict()
        assert all(torch.equal(weights[name], loaded[name]) for name in weights)


@pytest.mark.parametrize("preferred", [True, False])
def test_the_line_ends_at_the_last_epoch_where_it_is_preferred(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preferred: bool
) -> None:
    """With a rate that is much too high, which makes the last epoch a bad one."""
    monkeypatch.setattr(importlib.import_module("distil_tl.training.records"), "near", lambda *_: preferred)
    args = [*small, *WISE, "stages.full.epochs=3", "optim.schedule=constant", "seed=0", f"run_dir={tmp_path}/run"]
    assert train(args) == 0
    losses = [line["loss"] for line in lines(tmp_path / "run", split="val", stage="full")]
    assert losses[-1] > min(losses)
    summary = summary_of(tmp_path / "run")
    result = summary["stages"]["full"]["wise_ft"]
    assert result["epoch"] == (3 if preferred else losses.index(min(losses)) + 1)
    assert result["figures"][0]["loss"] == losses[result["epoch"] - 1]


def signal_at_an_alpha(number: int, evaluation: int) -> None:
    """This process gets a signal in one of the evaluations of interpolated weights, the first of which is 1."""
    original, calls = finish_module.evaluate, []

    def evaluate(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == evaluation:
            os.kill(os.getpid(), number)
        return original(*args, **more)

    finish_module.evaluate = evaluate


def stopped_at_an_alpha(args: list[str]) -> int:
    signal_at_an_alpha(signal.SIGTERM, 2)
    importlib.import_module("distil_tl.distributed.preemption").EXCHANGE_SECONDS = 0.0  # type: ignore[attr-defined]
    return train(args)


def test_a_stop_between_two_alphas(finished: Path, small: list[str], tmp_path: Path) -> None:
    args = [*small, *WISE, "stages.full.ema=0.5", f"run_dir={tmp_path}/run"]
    assert run_ranks(1, stopped_at_an_alpha, args) == [3]
    state = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())["run"]
    assert state["position"]["epoch"] == 2
    assert state["stages"]["full"]["wise_ft"] is None
    held = torch.load(tmp_path / "run/checkpoints/last/train_state.pt")
    assert held["interpolation"]["start"].keys() == held["interpolation"]["best"].keys() == held["raw"].keys()
    assert train(args) == 0
    same_run(tmp_path / "run", finished)


def same_run(run_dir: Path, reference: Path) -> None:
    """Byte-equal weights, and the same figures, also of each alpha."""
    same_result(run_dir, reference)
    one, two = (summary_of(path) for path in (run_dir, reference))
    assert [one[name] for name in ("best", "final")] == [two[name] for name in ("best", "final")]
    assert one["stages"]["full"]["wise_ft"]["figures"] == two["stages"]["full"]["wise_ft"]["figures"]


def test_a_kill_between_two_alphas_after_an_early_stop(small: list[str], tmp_path: Path) -> None:
    """The checkpoint that the run resumes from is that of the early end, with the best weights of the stage."""
    general = [*small, *WISE, "stages.full.ema=0.5", "stages.full.epochs=6", "stages.full.patience=1"]
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert attempt(tmp_path / "first", [*general, f"run_dir={whole}"], 1).statuses == [0]
    stage = summary_of(whole)["stages"]["full"]
    assert (stage["stopped_early"], 1 < stage["epochs"] < 6) == (True, True), stage["epochs"]
    assert stage["wise_ft"]["figures"][0]["loss"] == stage["best"]["loss"]
    args = [*general, f"run_dir={run_dir}"]
    killed = partial(signal_at_an_alpha, signal.SIGKILL, 4)  # when the last checkpoint is written
    assert attempt(tmp_path / "scratch", args, 1, prepare=killed).statuses == [-signal.SIGKILL]
    state = json.loads((run_dir / "checkpoints/last/state.json").read_text())["run"]["stages"]["full"]
    assert (state["stopped_early"], state["wise_ft"]) == (True, None)
    assert attempt(tmp_path / "again", args, 1).statuses == [0]
    same_run(run_dir, whole)
