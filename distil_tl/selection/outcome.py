"""The files of a selection: a result for each cell, and select.json with all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distil_tl.data.splits import Splits
from distil_tl.selection.cells import Cell, Estimate, Grid, Result, near_best, pareto
from distil_tl.utils.files import read_json, write_json, writing

CELLS = "cells"  # folder of the results of cells, also of earlier grids
TIMES = ("seconds", "images_per_second", "ranks", "budget_seconds")  # fields that differ from call to call


@dataclass
class Outcome:
    """Everything that select.json has.

    Attributes:
        missing: weights that are not on this machine, by backbone.
        left_out: why others were not tried, by backbone and size.
        estimate: of the best cell; None while there is none.
        no_estimate: why there is none.
        seconds: of this call.
    """

    grid: Grid
    splits: Splits
    missing: dict[str, str]
    left_out: dict[str, str]
    device: str
    ranks: int
    budget: float | None = None
    estimate: Estimate | None = None
    no_estimate: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """docs/select.md describes the fields."""
        grid, ranked = self.grid, self.grid.ranked()
        near, front = (near_best(ranked, grid.metric), list(pareto(ranked))) if ranked else ([], [])
        failed = {f"{cell.name} {cell.image_size} px": reason for cell, reason in grid.failed.items()}
        return {
            "metric": grid.metric,
            "classes": list(self.splits.classes),
            "images": {split: len(index) for split, index in self.splits.as_dict().items()},
            "best": row(ranked[0], grid.metric, near, front) if ranked else None,
            "estimate": None if self.estimate is None else asdict(self.estimate),
            "no_estimate": self.no_estimate,
            "near_best": len(near),
            "rows": [{**row(result, grid.metric, near, front), "heads": result.heads} for result in ranked],
            "effects": list(effects(ranked, grid)),
            "not_tried": [cell_fields(cell) for cell in grid.left],
            "left_out": self.left_out | failed,
            "missing_weights": self.missing,
            "device": self.device,
            "ranks": self.ranks,
            "budget_seconds": self.budget,
            "seconds": self.seconds,
        }


def cell_fields(cell: Cell) -> dict[str, Any]:
    gmacs = None if cell.multiply_adds is None else cell.multiply_adds / 1e9
    return {
        "model": cell.name,
        "image_size": cell.image_size,
        "crop_mode": cell.crop_mode,
        "parameters": cell.parameters,
        "gmacs": gmacs,
    }


def row(result: Result, metric: str, near: Iterable[Result], front: Iterable[Result]) -> dict[str, Any]:
    """A line of the table."""
    return {
        **cell_fields(result.cell),
        "weights": result.source,
        "features": result.features,
        "precision": result.precision,
        "n": result.n,
        **result.head,
        "interval": result.interval(metric),
        "near_best": result in near,
        "pareto": result in front,
        "images_per_second": result.images_per_second,
        "seconds": result.seconds,
    }


def effects(results: Sequence[Result], grid: Grid) -> Iterator[dict[str, Any]]:
    """What each size and crop changes, compared with the first one, over all cells that differ in nothing else."""
    for key in ("image_size", "crop_mode"):
        first, *others = dict.fromkeys(getattr(cell, key) for cell in grid.cells)
        figures: dict[tuple[Any, ...], dict[Any, float]] = {}
        for result in results:
            cell = result.cell
            rest = cell.name, cell.crop_mode if key == "image_size" else cell.image_size
            figures.setdefault(rest, {})[getattr(cell, key)] = result.value(grid.metric)
        for value in others:
            found = [each[value] - each[first] for each in figures.values() if value in each and first in each]
            if found:
                mean = math.fsum(found) / len(found)
                yield {
                    "key": key, "value": value, "compared_with": first, "pairs": len(found), "mean": mean,
                    "lowest": min(found), "highest": max(found),
                }  # fmt: skip


def save_cell(folder: Path, result: Result) -> None:
    """Write the result of a cell, for calls to come. Raises WriteError."""
    path = folder / CELLS / f"{result.cell.digest}.json"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(result))


def save_estimate(folder: Path, cell: Cell, found: Estimate) -> None:
    """Write the estimate for a cell, for calls to come. Raises WriteError."""
    path = folder / CELLS / f"{cell.digest}.estimate.json"
    with writing(path):
        write_json(path, asdict(found))


def saved_estimate(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The saved estimate for a cell; None if there is none that can be read."""
    try:
        tree: dict[str, Any] = read_json(folder / CELLS / f"{cell.digest}.estimate.json")
        Estimate(**tree)
    except (OSError, ValueError, TypeError):
        return None
    return tree


def saved_cells(folder: Path, cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """The saved results of these cells, by digest; what can't be read is left out."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        try:
            tree = read_json(folder / CELLS / f"{cell.digest}.json")
            read_result(cell, tree).interval("top1")
        except (OSError, ValueError, TypeError, KeyError):
            continue
        found[cell.digest] = tree
    return found


def read_result(cell: Cell, tree: dict[str, Any]) -> Result:
    """The result of a cell from its file; the cell itself is as in this call, and so are its costs."""
    return Result(**{**tree, "cell": cell})
