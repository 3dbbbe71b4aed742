"""The benchmark of select counts each part of a selection once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.select_cost import measure
from distil_tl.selection import costs
from distil_tl.selection.cell_search import CellSearch
from tests.helpers.arguments import SMALLEST


def test_the_parts_of_a_selection_are_counted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))  # without features of other tests
    before = CellSearch.open_cell
    args = [
        f"data.root={folder}", "data.global_batch_size=8", "data.workers=0", "model.weights=none", "precision=fp32",
        "distributed.device=cpu", "stages.head.epochs=1", "stages.head.search.lr=[0.1]", f"candidates={SMALLEST}",
        "sizes=32", "crops=[weights,squash]", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    parts = measure(args)
    assert set(parts) == {"forward", "images", "networks", "heads", "estimate", "rest", "start-up"}
    assert all(seconds > 0 for seconds in parts.values())
    assert CellSearch.open_cell is before, "nothing is counted afterwards"
