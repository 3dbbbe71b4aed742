"""The final evaluation: of the best checkpoint, in full, and not repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distil_tl import evaluate, finish, inference, train
from distil_tl.run import Run
from distil_tl.training import network, stage_setup
from distil_tl.training.precision import Compute
from distil_tl.training.records import Records
from tests.helpers.arguments import small_args


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases in which a run evaluates."""
    phases, original = list[str](), vars(train)["evaluate"]

    def noted(info: Any, *args: Any, **kwargs: Any) -> Any:
        phases.append(info.phase)
        return original(info, *args, **kwargs)

    for module in (train, finish):
        monkeypatch.setattr(module, "evaluate", noted)
    return phases


def same_as_the_command(run: Path, tmp_path: Path) -> bool:
    """Whether evaluation.json equals the result of `distil_tl.evaluate` for the best checkpoint."""
    again = tmp_path / "again.json"
    assert evaluate.main([str(run), "--json", str(again)]) == 0
    found, wanted = json.loads((run / "evaluation.json").read_text()), json.loads(again.read_text())
    wanted.pop("checkpoint")
    assert found["loss"] == pytest.approx(wanted.pop("loss"), rel=1e-6)
    best = json.loads((run / "summary.json").read_text())["best"]
    assert (best["top1"], best["loss"]) == (found["top1"], pytest.approx(found.pop("loss"), rel=1e-4))
    of_run, of_command = (each.pop("calibration")["raw"] for each in (found, wanted))
    assert [of_run[key] for key in ("n", "nll", "brier")] == [
        pytest.approx(of_command[key], rel=1e-5) for key in ("n", "nll", "brier")
    ]
    for mistake in (*found["mistakes"], *wanted["mistakes"]):
        mistake["probability"] = round(mistake["probability"], 4)
    assert len(found["mistakes"]) > 0
    return bool(found == wanted)


def test_what_was_evaluated_in_full_is_not_evaluated_again(folder: Path, tmp_path: Path, evaluated: list[str]) -> None:
    run = tmp_path / "run"
    args = [*small_args(folder), f"run_dir={run}", "stages.head.epochs=0", "stages.full.unfreeze=all"]
    assert train.main(args) == 0
    stage = json.loads((run / "summary.json").read_text())["stages"]["full"]
    assert evaluated == [f"the evaluation after epoch {i + 1} of stage full" for i in range(stage["epochs"])]
    assert stage["folded"] is True
    assert same_as_the_command(run, tmp_path)


def test_a_network_with_a_frozen_part_is_evaluated_again(folder: Path, tmp_path: Path, evaluated: list[str]) -> None:
    run = tmp_path / "run"
    assert train.main([*small_args(folder), f"run_dir={run}", "stages.full.epochs=0"]) == 0
    assert evaluated.count("the final evaluation on val") == 1
    assert json.loads((run / "summary.json").read_text())["stages"]["head"]["folded"] is None
    assert same_as_the_command(run, tmp_path)


def test_a_best_that_was_beaten_is_not_kept(
    folder: Path, tmp_path: Path, evaluated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Records.add_evaluation

    def best(self: Records, *args: Any, **more: Any) -> bool:
        self._state.best = None
        return original(self, *args, **more)

    monkeypatch.setattr(Records, "add_evaluation", best)
    run = tmp_path / "run"
    more = ["stages.head.unfreeze=all", "stages.full.unfreeze=head"]
    assert train.main([*small_args(folder), f"run_dir={run}", *more]) == 0
    assert json.loads((run / "summary.json").read_text())["best"]["stage"] == "full"
    assert evaluated.count("the final evaluation on val") == 1
    assert same_as_the_command(run, tmp_path)


def test_a_resumed_run_makes_the_missing_final_evaluation(
    folder: Path, tmp_path: Path, evaluated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    args = [*small_args(folder), f"run_dir={run}", "stages.head.epochs=0", "stages.full.unfreeze=all"]

    def fails(run: Run) -> None:
        assert run.state.stages["full"].folded
        raise OSError("the node is gone")

    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", fails)
        assert train.main(args) == 1
    assert not (run / "evaluation.json").exists()
    assert train.main(args) == 0
    assert evaluated.count("the final evaluation on val") == 1
    assert same_as_the_command(run, tmp_path)
    assert train.main([*args, f"run_dir={tmp_path}/whole"]) == 0
    assert (run / "evaluation.json").read_text() == (tmp_path / "whole" / "evaluation.json").read_text()


def test_a_frozen_part_in_bf16_is_evaluated_in_bf16(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of precisions may choose bf16 for the frozen part alone: the figures at the end are as at the best."""
    original, used = network.final_network, list[Any]()

    def noted(*args: Any) -> Any:
        used.append(original(*args))
        return used[-1]

    monkeypatch.setattr(stage_setup, "_prefix_compute", lambda *args: Compute(torch.bfloat16, True))
    for module in (finish, inference):
        monkeypatch.setattr(module, "final_network", noted)
    run = tmp_path / "run"
    args = [*small_args(folder), f"run_dir={run}", "stages.full.epochs=0", "precision=auto"]
    assert train.main(args) == 0
    stage = json.loads((run / "summary.json").read_text())["stages"]["head"]
    assert (stage["precision"], stage["prefix_precision"]) == ("fp32 channels_last", "bf16 channels_last")
    assert same_as_the_command(run, tmp_path)
    assert [type(each) for each in used] == [network.SplitNetwork] * 2
    assert all(str(each.prefix.compute) == "bf16 channels_last" for each in used)
