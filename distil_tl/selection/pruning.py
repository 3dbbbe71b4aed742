"""Pruning a long list of backbones: only those whose features have the highest LogME are searched.

The score needs features of some images of train alone, at the cheapest size and the first crop of a backbone, and no
training.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distil_tl.data.sampler import SampleKey, epoch_order
from distil_tl.data.splits import Splits
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.selection.cell_search import CellSearch, UnfitError
from distil_tl.selection.cells import Cell, Grid, Pruning, Score
from distil_tl.selection.logme import logme
from distil_tl.selection.outcome import save_score, saved_score
from distil_tl.training.network import dropout_and_head
from distil_tl.utils.errors import UserError
from distil_tl.utils.job_outcome import SAVED, note
from distil_tl.utils.log import logger

PER_CLASS, MOST = 20, 2000  # images of train of each class, and in all
LEAST = 5  # of each class: of one image the score can't tell what its class has in common


def prune(search: CellSearch, grid: Grid, keep: int, folder: Path) -> Pruning | None:
    """Leave the cells of the `keep` best backbones in the grid. None if it has no more. A collective.

    Raises as `CellSearch.search`, but for networks that can't be used, which fail in the grid.
    """
    firsts = first_cells(grid)
    if len(firsts) <= keep:
        return None
    info, common = search.info, search.common
    train = search.splits.train
    part = train.selected(some_of_each(train.targets, common.seed))
    plain = replace(common, config=replace(common.config, views=None, augment="none"))
    scorer = CellSearch(info, plain, Splits(part, part, None), search.agreement)
    scores: list[Score] = []
    logger.info("LogME of %d backbones, on %d images of train, to search the best %d", len(firsts), len(part), keep)
    for cell in firsts:
        found: Score | None = _read(cell, on_rank_zero(info, "looking for a score", lambda: saved_score(folder, cell)))  # noqa: B023
        if found is None:
            try:
                found = _score(scorer, cell)
            except UnfitError as error:
                for each in grid.cells:  # of all sizes: without a score it takes no place
                    if each.name == cell.name:
                        grid.fail(each, str(error))
                logger.info("left out: %s: %s", cell.title, error)
                continue
            on_rank_zero(info, "saving a score", lambda: save_score(folder, cell, found))  # noqa: B023
            if info.is_main:
                note(SAVED)  # the job has made progress
        logger.info("%s: LogME %.4f", cell.title, found.value)
        scores.append(found)
    scores.sort(key=lambda score: -score.value)  # equal ones in the order of the list
    kept = {score.cell.name for score in scores[:keep]} | {cell.name for cell in grid.failed}
    grid.cells = [cell for cell in grid.cells if cell.name in kept]
    grid.results = [result for result in grid.results if result.cell.name in kept]
    return Pruning(keep, scores)


def first_cells(grid: Grid) -> list[Cell]:
    """The cheapest cell of each backbone, in the order of the list."""
    found: dict[str, Cell] = {}
    for cell in grid.cells:
        found[cell.name] = min(found.get(cell.name, cell), cell, key=lambda each: each.cost)
    return list(found.values())


def some_of_each(targets: np.ndarray, seed: int) -> np.ndarray:
    """Which images are used, bool [N]: as many of each class, where it has them. Of many classes some are drawn."""
    classes = np.unique(targets)
    each = max(LEAST, min(PER_CLASS, MOST // max(1, len(classes))))
    order = epoch_order(len(targets), seed, "logme", 0)
    by_class = order[np.argsort(targets[order], kind="stable")]
    sorted_targets = targets[by_class]
    position = np.arange(len(targets)) - np.searchsorted(sorted_targets, sorted_targets)  # within its class
    drawn = classes[epoch_order(len(classes), seed, "logme classes", 0)[: MOST // LEAST]]
    chosen = np.zeros(len(targets), dtype=bool)
    chosen[by_class[(position < each) & np.isin(sorted_targets, drawn)]] = True
    return chosen


def _score(scorer: CellSearch, cell: Cell) -> Score:
    began = time.monotonic()
    try:
        opened = scorer.open_cell(cell)
        layers, _ = dropout_and_head(opened.setup.network, opened.stage)
    except UserError as error:
        scorer.refuse_cell(error)
    features = opened.setup.features
    assert features is not None

    def compute() -> tuple[float | None, int]:
        batch = features.train.__getitems__([SampleKey(i, 0, i) for i in range(len(features.train))])
        with torch.no_grad():
            rows = layers.eval()(batch.images.to(scorer.info.device).float()).flatten(1).cpu()[batch.valid]
        if not rows.isfinite().all():
            return None, len(rows)
        targets = batch.targets[batch.valid].numpy()
        return (logme(rows.numpy(), targets) if len(rows) else float("-inf")), len(rows)

    value, images = on_rank_zero(scorer.info, "computing LogME", compute)
    if value is None:
        raise UnfitError("its features are not finite: use another precision")
    return Score(cell, float(value), int(images), time.monotonic() - began)


def _read(cell: Cell, tree: dict[str, Any] | None) -> Score | None:
    return None if tree is None else Score(**{**tree, "cell": cell})
