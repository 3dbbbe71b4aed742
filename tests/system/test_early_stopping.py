"""Stages that end early: the same on any number of ranks, after a signal and after a kill."""

from __future__ import annotations

import importlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distil_tl import train as train_module
from distil_tl.train import main
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import same_result, stopped_train, summary_of

BEST = 2  # the epoch that `best_in_epoch_two` ranks first
PATIENT = [
    "stages.head.epochs=6", "stages.head.patience=2", "stages.full.epochs=1", "stages.full.unfreeze=all",
    "checkpoint.keep=1", "stages.head.ema=0.9",
]  # fmt: skip


def best_in_epoch_two(metric: str, figures: dict[str, Any]) -> tuple[float, float]:
    return abs(figures["epoch"] - BEST), 0.0


def train_to_epoch_two(args: list[str], *stop: Any) -> int:
    """A run in which every stage is at its best in epoch two, in this process or a rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("distil_tl.training.records"), "rank_by", best_in_epoch_two)
        return stopped_train(args, *stop) if stop else train(args)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.arguments import small_args

    run_dir = tmp_path_factory.mktemp("early") / "finished"
    assert run_ranks(2, train_to_epoch_two, [*small_args(folder), *PATIENT, f"run_dir={run_dir}"]) == [0, 0]
    return run_dir


def test_a_stage_out_of_patience_ends_with_its_best_weights(finished: Path) -> None:
    val = [(line["stage"], line["epoch"], line["step"]) for line in lines(finished, split="val")]
    assert val == [("head", 1, 6), ("head", 2, 12), ("head", 3, 18), ("head", 4, 24), ("full", 1, 30)]
    stages = summary_of(finished)["stages"]
    assert (stages["head"]["epochs"], stages["head"]["stopped_early"]) == (4, True)
    assert (stages["head"]["best"]["epoch"], stages["full"]["stopped_early"]) == (BEST, False)
    state = json.loads((finished / "checkpoints" / "last" / "state.json").read_text())
    assert state["run"]["stages"]["head"]["stopped_early"] is True
    report = (finished / "report.html").read_text()
    assert "Stage head ended early, after 4 epochs" in report
    # The rate is that of six epochs: two thirds of the way down the cosine, not at its end.
    rates = [line["lr"] for line in lines(finished, stage="head", window="interval")]
    assert rates[-1] > 0.1 * max(rates)


def test_the_next_stage_starts_from_the_best_weights_also_after_a_kill(
    finished: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the next stage is set up: the last checkpoint is that of the end of the stage."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert train_to_epoch_two([*small, *PATIENT, f"run_dir={whole}"]) == 0

    def fail(*args: Any) -> Any:
        if args[1].name == "full":
            raise RuntimeError("killed")
        return original(*args)

    original: Any = vars(train_module)["set_up_stage"]
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "set_up_stage", fail)
        assert train_to_epoch_two([*small, *PATIENT, f"run_dir={run_dir}", "checkpoint.keep=9"]) == 1
    saved = run_dir / "checkpoints"
    assert (saved / "last").readlink() == Path("step-00000024")
    best, last, third = (
        load_file(saved / name / "weights.safetensors") for name in ("step-00000012", "last", "step-00000018")
    )
    assert all(torch.equal(best[key], last[key]) for key in best)
    assert not all(torch.equal(third[key], last[key]) for key in best)
    assert train_to_epoch_two([*small, *PATIENT, f"run_dir={run_dir}"]) == 0
    same_result(run_dir, whole)
    figures = [[line["top1"] for line in lines(path, split="val")] for path in (run_dir, finished)]
    assert figures[0] == figures[1], "one rank and two"


def test_a_signal_before_the_end_of_patience_changes_nothing(finished: Path, small: list[str], tmp_path: Path) -> None:
    args = [*small, *PATIENT, f"run_dir={tmp_path}/run"]
    assert run_ranks(2, train_to_epoch_two, args, 15, 1, signal.SIGTERM) == [3, 3]
    assert run_ranks(2, train_to_epoch_two, args) == [0, 0]
    same_result(tmp_path / "run", finished)


def test_a_run_that_stopped_early_is_complete(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*small, "stages.head.epochs=0", "stages.full.epochs=9", "stages.full.patience=1", f"run_dir={tmp_path}/run"]
    assert train_to_epoch_two(args) == 0
    assert "full ends early, with the weights of epoch 2: patience 1" in capsys.readouterr().out
    assert main(args) == 0
    assert "completed" in capsys.readouterr().out
    assert len(lines(tmp_path / "run", split="val")) == 3


def test_best_weights_that_are_lost_leave_the_last_ones(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_module: Any = importlib.import_module("distil_tl.run")
    monkeypatch.setattr(run_module, "find_damage", lambda path: "weights.safetensors is missing")
    args = [*small, "stages.head.epochs=9", "stages.head.patience=1", "stages.full.epochs=0", f"run_dir={tmp_path}/run"]
    assert train_to_epoch_two(args) == 0
    assert "the best weights of stage head are lost" in capsys.readouterr().out
