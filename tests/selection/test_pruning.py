"""Pruning by LogME: backbones that fail, and progress of a job."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distil_tl.data.config import DataConfig
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.config import ModelConfig
from distil_tl.selection import pruning
from distil_tl.selection.cell_search import UnfitError
from distil_tl.selection.cells import Cell, Grid, Score
from distil_tl.selection.common import Common
from distil_tl.training.config import OptimConfig, StageConfig
from distil_tl.utils.job_outcome import SAVED, VARIABLE, notes

INFO = DistInfo(Launch(), torch.device("cpu"), 60)


def test_features_that_are_not_finite_are_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Train:
        def __len__(self) -> int:
            return 6

        def __getitems__(self, keys: list[Any]) -> Any:
            images = torch.randn(6, 3).index_fill(0, torch.tensor([2]), torch.inf)
            return SimpleNamespace(images=images, targets=torch.arange(6) % 2, valid=torch.ones(6, dtype=torch.bool))

    setup = SimpleNamespace(network=None, features=SimpleNamespace(train=Train()))
    scorer: Any = SimpleNamespace(info=INFO, open_cell=lambda cell: SimpleNamespace(setup=setup, stage=None))
    monkeypatch.setattr(pruning, "dropout_and_head", lambda *args: (nn.Sequential(), None))
    with pytest.raises(UnfitError, match="not finite"):
        pruning._score(scorer, Cell("a", "none", 32, "x", 1, 1))


def test_a_backbone_that_fails_takes_no_place_and_scores_are_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell(name, "none", size, "x", 1, size, digest=f"{name}{size}") for name in "abc" for size in (64, 32)]

    def score(scorer: Any, cell: Cell) -> Score:
        if cell.name == "a":
            raise UnfitError("no")
        return Score(cell, float(ord(cell.name)), 6, 1.0)

    monkeypatch.setattr(pruning, "_score", score)
    monkeypatch.setattr(pruning, "CellSearch", lambda *args: None)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome"))
    (tmp_path / "cells").mkdir()
    common = Common(
        "head", StageConfig(), ModelConfig(), DataConfig(), OptimConfig(), "top1", "fp32", 0,
        tf32=True, deterministic=False,
    )  # fmt: skip
    train = SimpleNamespace(targets=np.arange(6) % 2, selected=lambda chosen: range(int(chosen.sum())))
    search: Any = SimpleNamespace(info=INFO, common=common, splits=SimpleNamespace(train=train), agreement=None)
    grid = Grid(cells, "top1")
    assert pruning.prune(search, grid, 1, tmp_path) is not None
    assert grid.left == cells[4:]
    assert set(grid.failed) == set(cells[:2])
    assert notes() == [SAVED]
