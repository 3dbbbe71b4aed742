"""`max_minutes`: epochs from the measured speed, decided once and kept."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distil_tl import time_limit
from distil_tl.cli.extend import extended
from distil_tl.config import load, problems, run_name
from distil_tl.rundir.changes import unsafe_changes
from distil_tl.time_limit import affordable_epochs
from distil_tl.train import main
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import same_result, stopped_train, summary_of

EPOCHS = {"head": 3, "full": 5}


@pytest.mark.parametrize(
    ("seconds", "per_epoch", "stage", "expected"),
    [
        (800, 100, "head", 3),  # exactly its share
        (799, 100, "head", 2),
        (10_000, 1, "head", 3),  # not more than configured
        (10, 100, "head", 1),  # not less than one
        (-5, 100, "head", 1),
        (250, 100, "full", 2),  # the last stage has all that is left
    ],
)
def test_the_epochs_that_fit(seconds: float, per_epoch: float, stage: str, expected: int) -> None:
    left = EPOCHS if stage == "head" else {"full": 5}
    assert affordable_epochs(seconds, per_epoch, left, stage) == expected


def test_the_limit_is_above_zero_and_part_of_the_name() -> None:
    base = ["model.name=resnet18", "model.weights=none"]
    config, _ = load([*base, "max_minutes=0"])
    assert list(problems(config, 1)) == ["max_minutes must be above 0, or null for no limit"]
    limited, unlimited = (load([*base, *more])[0] for more in (["max_minutes=5"], []))
    assert run_name(limited) != run_name(unlimited)
    trees = [dataclasses.asdict(config) for config in (limited, unlimited)]
    assert unsafe_changes(trees[0], trees[1], ["head"]) == [], "stages that have begun keep their epochs"


def train_with_speeds(args: list[str], seconds: dict[str, float], *stop: Any) -> int:
    """A run in which an epoch of each stage takes these seconds, for a rank; it measures them all the same."""
    original = time_limit.measure

    def measure(run: Any, training: Any, take_step: Any) -> dict[str, float]:
        found = original(run, training, take_step)
        assert set(found) == {"training", "evaluation"}
        assert all(value > 0 for value in found.values())
        run.ticked_at, run.state.seconds = time.monotonic(), 0.0
        return {"training": seconds[training.stage.name], "evaluation": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_limit, "measure", measure)
        patch.setattr(time_limit, "MARGIN", 1.2)  # as time passes before the epochs are decided
        return stopped_train(args, *stop) if stop else train(args)


LONG = ["stages.head.epochs=6", "stages.full.epochs=6", "stages.full.unfreeze=all", "stages.full.batch_norm=train"]
SPEEDS = {"head": 15.0, "full": 60.0}  # two minutes are two epochs of full; of head all would fit, and half do


def test_a_limited_run_is_the_same_as_one_with_these_epochs(small: list[str], tmp_path: Path) -> None:
    """The steps that were measured are undone: weights, statistics, optimizer, samples and random numbers."""
    run_dir = tmp_path / "run"
    assert run_ranks(2, train_with_speeds, [*small, *LONG, "max_minutes=2", f"run_dir={run_dir}"], SPEEDS) == [0, 0]
    stages = summary_of(run_dir)["stages"]
    assert {name: stage["epochs"] for name, stage in stages.items()} == {"head": 4, "full": 2}
    assert stages["full"]["limit"]["configured"] == 6
    views = {"data.crop_mode": "weights", "data.augment": "light"}
    resolved = {"stages.head.epochs": 4, "stages.full.epochs": 2, **views}
    assert summary_of(run_dir)["resolved"] == resolved
    given = [*small, *LONG, "stages.head.epochs=4", "stages.full.epochs=2", f"run_dir={tmp_path}/given"]
    assert run_ranks(2, train, given) == [0, 0]
    same_result(run_dir, tmp_path / "given")


def test_what_was_decided_is_kept_on_another_machine(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second stage, and resumed where an epoch takes a hundred times as long."""
    mixing = ["stages.full.mixup=0.2", "stages.full.mix_off_epochs=2"]
    args = [*small, *LONG, *mixing, "max_minutes=2", f"run_dir={tmp_path}/run"]
    assert run_ranks(1, train_with_speeds, args, SPEEDS, 26, 0, signal.SIGTERM) == [3]
    state = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())["run"]
    assert (state["position"]["stage"], state["resolved"]["stages.full.epochs"]) == ("full", 2)
    assert (tmp_path / "run/logs/rank-0.log").read_text().count("stages.full mixes no images: it has 2 epochs") == 1
    assert train_with_speeds(args, {"head": 6000.0, "full": 6000.0}) == 0
    assert "epochs fit into max_minutes" not in capsys.readouterr().out
    assert [line["epoch"] for line in lines(tmp_path / "run", split="val", stage="full")] == [1, 2]
    assert main(args) == 0
    assert "completed" in capsys.readouterr().out
    tree, _ = extended(tmp_path / "run", ["stages.full.epochs=+1"])
    assert tree["max_minutes"] is None
    assert tree["stages"]["full_2"]["epochs"] == 1
