"""A signal before training: the run ends at once, wherever it is."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest

from distil_tl.distributed.preemption import StopSignal
from distil_tl.models import timm_models
from distil_tl.train import main
from distil_tl.utils.errors import PreemptedError


def raise_signal(*_args: object, **_options: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGTERM)
    raise OSError("the handler has not raised")


def test_a_library_that_handles_errors_of_its_download_does_not_catch_a_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", raise_signal)
    with StopSignal(), pytest.raises(PreemptedError, match="stopped by SIGTERM before training started"):
        timm_models._create("vit_tiny_patch16_224", True)


@pytest.mark.parametrize("during", ["look_for_start", "open_splits", "download_weights", "build"])
def test_a_signal_in_start_up_ends_the_run_with_status_3(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], during: str
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    train: Any = importlib.import_module("distil_tl.train")
    monkeypatch.setattr(train, during, raise_signal)
    assert main([*small, f"run_dir={tmp_path}/run"]) == 3
    assert "stopped by SIGTERM before training started; run the same command to start again" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert {number: signal.getsignal(number) for number in before} == before
