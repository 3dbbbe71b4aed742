"""The files of a selection: a result for each cell, and select.json with all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distil_tl.data.splits import Splits
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.rundir.lock import Attempt
from distil_tl.selection.cells import Cell, Estimate, Grid, Pruning, Result, Score, near_best, pareto, startable
from distil_tl.selection.config import STARTABLE
from distil_tl.training.config import rank_by
from distil_tl.utils.errors import SupersededError, UserError
from distil_tl.utils.files import read_json, write_json, writing
from distil_tl.utils.log import printable

CELLS = "cells"  # folder of the results of cells, also of earlier grids
LOCK = "lock.json"  # the process that uses the folder
# Versions of what a file has, which are in its name: increased where it is computed differently.
VERSIONS = dict.fromkeys(("logistic", "ridge", "lda", "prototypes", "cosine", "knn", "mlp", "logme"), 2)


@dataclass
class Outcome:
    """Everything that select.json has.

    Attributes:
        missing: weights that are not on this machine, by backbone.
        left_out: why others were not tried, by backbone and size.
        estimate: of the best cell; None while there is none.
        no_estimate: why there is none.
        pruning: which backbones LogME left; None if it was not asked for, or there were no more than it would leave.
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
    pruning: Pruning | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """docs/select.md describes the fields."""
        grid, ranked = self.grid, self.grid.ranked()
        near, front = (near_best(ranked, grid.metric), list(pareto(ranked))) if ranked else ([], [])
        return {
            "metric": grid.metric,
            "classes": list(self.splits.classes),
            "images": {split: len(index) for split, index in self.splits.as_dict().items()},
            "best": row(ranked[0], grid.metric, near, front) if ranked else None,
            "estimate": None if self.estimate is None else asdict(self.estimate),
            "no_estimate": self.no_estimate,
            "best_yaml": _begins_with(grid) if ranked else None,
            "near_best": len(near),
            "rows": [{**row(result, grid.metric, near, front), "heads": result.heads} for result in ranked],
            "effects": list(effects(ranked, grid)),
            "pruning": None if self.pruning is None else pruning_fields(self.pruning, ranked, grid.metric),
            "not_tried": [cell_fields(cell) for cell in grid.left],
            "left_out": self.left_out | grid.reasons(),
            "missing_weights": self.missing,
            "device": self.device,
            "ranks": self.ranks,
            "budget_seconds": self.budget,
            "seconds": self.seconds,
        }


def _begins_with(grid: Grid) -> dict[str, Any]:
    """What best.yaml begins with. Where no head can begin a run, its linear head is searched."""
    result = startable(grid)
    head = result.kind if result.kind in STARTABLE else "linear"
    cell = cell_fields(result.cell)
    return {**{key: cell[key] for key in ("model", "image_size", "crop_mode", "readout")}, "head": head}


def cell_fields(cell: Cell) -> dict[str, Any]:
    gmacs = None if cell.multiply_adds is None else cell.multiply_adds / 1e9
    return {
        "model": cell.name,
        "image_size": cell.image_size,
        "crop_mode": cell.crop_mode,
        "readout": cell.readout,
        "parameters": cell.parameters,
        "gmacs": gmacs,
    }


def pruning_fields(pruning: Pruning, results: Sequence[Result], metric: str) -> dict[str, Any]:
    """The LogME of each backbone, the best first, which ones were searched, and whether val has the same order."""
    best: dict[str, Result] = {}
    for result in results:
        best.setdefault(result.cell.name, result)
    values = [best[score.cell.name].value(metric) for score in pruning.scores if score.cell.name in best]
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :] if a != b]
    better = sum(a < b if metric == "loss" else a > b for a, b in pairs)
    scores = [
        {
            "model": score.cell.name, "image_size": score.cell.image_size, "logme": score.value,
            "images": score.images, "kept": place < pruning.keep, "seconds": score.seconds,
        }
        for place, score in enumerate(pruning.scores)
    ]  # fmt: skip
    return {"keep": pruning.keep, "scores": scores, "pairs": len(pairs), "same_order": better}


def row(result: Result, metric: str, near: Iterable[Result], front: Iterable[Result]) -> dict[str, Any]:
    """A line of the table."""
    return {
        **cell_fields(result.cell),
        "head": result.kind,
        "weights": result.source,
        "features": result.features,
        "precision": result.precision,
        "n": result.n,
        "n_train": result.trained,
        **result.head,
        "interval": result.interval(metric),
        "near_best": result in near,
        "pareto": result in front,
        "images_per_second": result.images_per_second,
        "seconds": result.seconds,
    }


def effects(results: Sequence[Result], grid: Grid) -> Iterator[dict[str, Any]]:
    """What sizes, crops, read-outs and heads change, compared with the first, over all that differ in nothing else."""
    keys = ("image_size", "crop_mode", "readout")
    values = {key: [getattr(cell, key) for cell in grid.cells] for key in keys} | {"head": list(grid.heads)}
    for key, tried in values.items():
        first, *others = dict.fromkeys(tried)
        figures: dict[tuple[Any, ...], dict[Any, float]] = {}
        for result in results:
            own = {each: getattr(result.cell, each) for each in keys} | {"head": result.kind}
            value = own.pop(key)
            figures.setdefault((result.cell.name, *own.values()), {})[value] = result.value(grid.metric)
        for value in others:
            found = [each[value] - each[first] for each in figures.values() if value in each and first in each]
            if found:
                mean = math.fsum(found) / len(found)
                yield {
                    "key": key, "value": value, "compared_with": first, "pairs": len(found), "mean": mean,
                    "lowest": min(found), "highest": max(found),
                }  # fmt: skip


def check_folder(folder: Path) -> None:
    """Create the folder. Raises UserError if it can't be, or has other files than those of an earlier selection."""
    shown = f"--out {printable(folder)}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{shown} is not a folder; name another one")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CELLS).is_dir():
        raise UserError(f"{shown} has other files than those of an earlier selection; name another folder")
    try:
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{shown} can't be created: {error.strerror or error}; name another folder") from None


@contextmanager
def claimed(info: DistInfo, folder: Path) -> Iterator[Attempt]:
    """The folder is used by this process in the block. A collective.

    Raises:
        UserError: as `check_folder`, or another process of this machine is using it.
    """
    lock = Attempt(folder, LOCK)

    def claim() -> None:
        check_folder(folder)
        lock.refuse_if_in_use()
        lock.begin(0, {})  # that a job makes progress is checked where it is requeued

    on_rank_zero(info, "checking the output", claim)
    try:
        yield lock
    finally:
        with suppress(SupersededError, OSError):
            lock.end()


def save_cell(folder: Path, result: Result) -> None:
    """Write the result of a cell, for calls to come. Raises WriteError."""
    path = folder / CELLS / _file(result.cell, result.kind)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(result))


def _file(cell: Cell, kind: str, what: str = "") -> str:
    """The name of a file of a cell. Linear heads are not named in it: earlier versions had no others."""
    parts = [] if kind == "linear" else [f"{kind}{VERSIONS[kind]}"]
    return ".".join([cell.digest, *parts, *([what] if what else []), "json"])


def save_score(folder: Path, cell: Cell, score: Score) -> None:
    """Write the LogME of a cell, for calls to come. Raises WriteError."""
    path = folder / CELLS / _file(cell, "logme")
    with writing(path):
        write_json(path, asdict(score))


def saved_score(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The saved LogME of a cell; None if there is none that can be read."""
    try:
        tree: dict[str, Any] = read_json(folder / CELLS / _file(cell, "logme"))
        math.isfinite(Score(**tree).value)
    except (OSError, ValueError, TypeError):
        return None
    return tree


def save_estimate(folder: Path, result: Result, found: Estimate) -> None:
    """Write the estimate for a result, for calls to come. Raises WriteError."""
    path = folder / CELLS / _file(result.cell, result.kind, "estimate")
    with writing(path):
        write_json(path, asdict(found))


def saved_estimate(folder: Path, result: Result) -> dict[str, Any] | None:
    """The saved estimate for a result; None if there is none that can be read."""
    try:
        tree: dict[str, Any] = read_json(folder / CELLS / _file(result.cell, result.kind, "estimate"))
        found = Estimate(**tree)
        valid = math.isfinite(found.value) and found.n >= 1
    except (OSError, ValueError, TypeError):
        return None
    return tree if valid else None


def saved_cells(
    folder: Path, cells: Iterable[Cell], heads: Sequence[str], metric: str
) -> dict[str, list[dict[str, Any]]]:
    """The saved results of these cells and kinds of heads, by digest; what can't be read is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        for kind in heads:
            try:
                tree = read_json(folder / CELLS / _file(cell, kind))
                result = read_result(cell, tree)
                result.interval("top1")
                if result.n < 1 or not all(map(math.isfinite, rank_by(metric, result.head))):
                    continue
            except (OSError, ValueError, TypeError, KeyError):
                continue
            found.setdefault(cell.digest, []).append(tree)
    return found


def read_result(cell: Cell, tree: dict[str, Any]) -> Result:
    """The result of a cell from its file; the cell itself is as in this call, and so are its costs."""
    return Result(**{**tree, "cell": cell})
