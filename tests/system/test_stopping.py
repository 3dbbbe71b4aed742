"""A run that is stopped: what is saved, what is written, and what is freed between stages."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from distil_tl import train
from distil_tl.rundir.checkpoint import Checkpoints
from tests.helpers.runs import summary_of


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to this process after an optimizer step."""
    original, taken = vars(train)["optimizer_step"], iter(range(1, 1000))

    def optimizer_step(*args: Any) -> None:
        original(*args)
        if next(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "optimizer_step", optimizer_step)


def test_an_error_while_saving_on_a_stop_fails_the_run(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_fill", full)
    stop_at(3, monkeypatch)
    assert train.main([*small, f"run_dir={tmp_path}/run"]) == 1
    assert "can't write the checkpoint" in capsys.readouterr().err
    assert summary_of(tmp_path / "run")["status"] == "failed"
    assert "ended_at" in json.loads((tmp_path / "run" / "attempt.json").read_text())


def test_a_stage_is_freed_before_the_next_one_is_set_up(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, alive = vars(train)["set_up_stage"], []

    def set_up_stage(*args: Any) -> Any:
        gc.collect()
        alive.append(sum(issubclass(type(found), torch.optim.Optimizer) for found in gc.get_objects()))
        return original(*args)

    monkeypatch.setattr(train, "set_up_stage", set_up_stage)
    assert train.main([*small, f"run_dir={tmp_path}/run", "stages.full.epochs=1"]) == 0
    assert len(alive) == 2
    assert alive[1] == alive[0]


def test_a_run_resumed_from_another_directory_saves_a_checkpoint_of_its_own_when_it_is_stopped(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the evaluation after the first epoch, so that there is no step left to train before it."""
    args = [*small, "stages.full.epochs=0"]
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        assert train.main([*args, f"run_dir={tmp_path}/one"]) == 3
    original = vars(train)["evaluate"]

    def evaluate(*given: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert train.main([*args, f"run_dir={tmp_path}/two", f"resume={tmp_path}/one"]) == 3
    assert Checkpoints(tmp_path / "two" / "checkpoints").newest_valid() is not None
    shutil.rmtree(tmp_path / "one")
    assert train.main([*args, f"run_dir={tmp_path}/two"]) == 0
