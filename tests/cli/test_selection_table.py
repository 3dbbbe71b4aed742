"""The table of `distil-tl select`: redrawn in place on a terminal."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from distil_tl.cli.selection_table import Live, effect_table, headline, result_table
from distil_tl.selection.cells import Cell, Grid, Result
from distil_tl.selection.outcome import Outcome
from distil_tl.utils.log import logger


def result(cell: Cell, top1: float) -> Result:
    head = {"lr": 0.01, "weight_decay": 0.1, "top1": top1, "loss": 1.0}
    return Result(cell, "none", 100, head, [head], "fp32", 8, 321.4, 2.0)


def cells() -> list[Cell]:
    return [Cell(name, "none", 64, "squash", 1_200_000, 250_000_000, name) for name in ("first", "second")]


def test_the_table_has_the_best_first_with_its_costs() -> None:
    grid = Grid(cells(), "top1")
    grid.results = [result(cell, top1) for cell, top1 in zip(grid.cells, (0.5, 0.8), strict=True)]
    lines = result_table(grid).splitlines()
    assert lines[0].split()[:3] == ["backbone", "px", "crop"]
    head = "linear lr 0.01 decay 0.1"
    assert " ".join(lines[2].split()) == f"second 64 squash 0.8000 0.711 to 0.867 * 1.2 0.25 321 {head} 2.0"
    assert lines[3].startswith("first ")
    assert "*" not in lines[3]


def test_a_narrow_terminal_gets_no_line_that_wraps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "8")
    grid = Grid(cells(), "top1")
    grid.results = [result(cell, top1) for cell, top1 in zip(grid.cells, (0.5, 0.8), strict=True)]
    with Live(grid, show=True) as live:
        live.begin(grid.cells[0])
        shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) == 40
    assert len(shown) < 8


def test_on_a_terminal_each_table_replaces_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    logger.setLevel(logging.DEBUG)
    grid = Grid(cells(), "top1")
    with Live(grid, show=True) as live:
        assert logger.level == logging.WARNING, "other lines would be in the way"
        live.begin(grid.cells[0])
        grid.results.append(result(grid.cells[0], 0.5))
        live.end(grid.results[0])
        live.begin(grid.cells[1])
    assert logger.level == logging.DEBUG
    first, second, rest = capsys.readouterr().out.split("\x1b[J")
    assert "0/2 done, now first 64 px squash" in first
    assert first.endswith(f"\x1b[{first.count(chr(10))}A"), "as many lines up as there were"
    assert "0.5000" in second
    assert "1/2 done, now second" in second
    assert rest == ""


def outcome(metric: str, kinds: tuple[str, ...]) -> Outcome:
    """Results of two cells, the second one better, and of its kinds of heads the first one."""
    grid = Grid(cells(), metric, heads=kinds)
    for number, cell in enumerate(grid.cells):
        for place, kind in enumerate(kinds):
            top1 = 0.5 + 0.2 * number - 0.1 * place
            grid.results.append(replace(result(cell, top1), kind=kind))
    index: Any = SimpleNamespace(as_dict=lambda: {"train": range(90), "val": range(100)})
    return Outcome(grid, index, {}, {}, "cpu", 1, no_estimate="none")


def test_what_heads_add_is_printed() -> None:
    lines = [line.split() for line in effect_table(outcome("top1", ("linear", "ridge"))).splitlines()]
    assert lines[0][-4:] == ["compared", "with", "pairs", "top-1"]
    assert lines[2] == ["ridge", "linear", "2", "-0.1000"]
    assert effect_table(outcome("top1", ("linear",))) == "", "two backbones alone"


@pytest.mark.parametrize(("metric", "wrong"), [("top1", "too high"), ("loss", "too low")])
def test_the_best_of_several_is_chosen_by_its_figure(metric: str, wrong: str) -> None:
    lines = headline(outcome(metric, ("knn", "ridge")))
    assert any(f"so it is rather {wrong}; no other figure: none" in line for line in lines)
    place = next(i for i, line in enumerate(lines) if line.startswith("best.yaml begins with"))
    assert "ridge head" in lines[place]
    assert place < len(lines) - 2, "before what it is expected to have"
