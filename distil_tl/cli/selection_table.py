"""What `distil-tl select` prints: a table that is redrawn on a terminal, or a line for each cell in a log."""

from __future__ import annotations

import logging
import shutil
import sys
from types import TracebackType

from distil_tl.report.text import chosen_by_it, metric_name, settings_of
from distil_tl.selection.cells import Cell, Grid, Result, near_best, startable
from distil_tl.selection.config import STARTABLE
from distil_tl.selection.outcome import Outcome, effects
from distil_tl.utils.errors import listed
from distil_tl.utils.log import duration, logger, table

LIVE_ROWS, SHOWN_ROWS = 15, 30  # while it runs, and at the end
OTHER_LINES = 6  # of the live table: its header, what runs now, and the cursor


class Live:
    """The progress of a selection. On a terminal other messages than warnings are left out, as the table moves."""

    def __init__(self, grid: Grid, *, show: bool) -> None:
        self.grid = grid
        self.shows = show
        self.redraws = show and sys.stdout.isatty()
        self._lines = 0
        self._level = logger.level

    def __enter__(self) -> Live:
        if self.redraws:
            self._level = logger.level
            logger.setLevel(logging.WARNING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.redraws:
            self._draw("")
            logger.setLevel(self._level)

    @property
    def _count(self) -> str:
        return f"{len(self.grid.cells) - len(self.grid.left)}/{len(self.grid.cells)}"

    def begin(self, cell: Cell) -> None:
        if self.redraws:
            rows = max(1, min(LIVE_ROWS, shutil.get_terminal_size().lines - OTHER_LINES))
            self._draw(f"{result_table(self.grid, rows)}\n\n{self._count} done, now {cell.title}\n")
        elif self.shows:
            logger.info("\n%s done, now %s", self._count, cell.title)

    def end(self, result: Result) -> None:
        if not self.redraws and self.shows:
            best = self.grid.ranked()[0]
            logger.info(
                "%s: %s; best so far %s: %s", self.grid.title(result), _figure(self.grid, result),
                self.grid.title(best), _figure(self.grid, best),
            )  # fmt: skip

    def failed(self, cell: Cell, reason: str) -> None:
        if not self.redraws and self.shows:
            logger.info("left out: %s: %s", cell.title, reason)

    def _draw(self, text: str) -> None:
        """Replace what was drawn before. Lines are cut to the width of the terminal, where they would be wrapped."""
        up = f"\x1b[{self._lines}A\x1b[J" if self._lines else ""
        width = shutil.get_terminal_size().columns
        sys.stdout.write(up + "\n".join(line[:width] for line in text.split("\n")))
        sys.stdout.flush()
        self._lines = text.count("\n")


def _figure(grid: Grid, result: Result) -> str:
    return f"{metric_name(grid.metric)} {result.value(grid.metric):.4f}"


def result_table(grid: Grid, rows: int | None = None) -> str:
    """The results so far, the best first; of more than `rows` only the first ones."""
    metric, ranked = grid.metric, grid.ranked()
    near = near_best(ranked, metric) if ranked else []
    lines = []
    for result in ranked[:rows]:
        cell, interval = result.cell, result.interval(metric)
        lines.append(
            [
                cell.name, str(cell.image_size), cell.crop_mode + cell.other_readout, f"{result.value(metric):.4f}",
                "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
                "*" if result in near else "", f"{cell.parameters / 1e6:.1f}",
                "-" if cell.multiply_adds is None else f"{cell.multiply_adds / 1e9:.2f}",
                "-" if result.images_per_second is None else f"{result.images_per_second:.0f}",
                f"{result.kind} {settings_of(result.head)}".rstrip(), f"{result.seconds:.1f}",
            ]
        )  # fmt: skip
    crop = "crop, read-out" if any(result.cell.other_readout for result in ranked) else "crop"
    shown = f"{metric_name(metric)} on val"
    header = ["backbone", "px", crop, shown, "95 %", "", "M params", "GMACs", "images/s", "head", "seconds"]
    return table(lines, header)


def effect_table(outcome: Outcome) -> str:
    """What sizes, crops, read-outs and heads add to the first one, in the mean; empty if there is one of each."""
    metric = metric_name(outcome.grid.metric)
    rows = [
        [f"{each['value']}{' px' if each['key'] == 'image_size' else ''}", str(each["compared_with"]),
         str(each["pairs"]), f"{each['mean']:+.4f}"]
        for each in effects(outcome.grid.ranked(), outcome.grid)
    ]  # fmt: skip
    return table(rows, ["everything else equal", "compared with", "pairs", metric]) if rows else ""


def headline(outcome: Outcome) -> list[str]:
    """The result in sentences."""
    grid = outcome.grid
    ranked = grid.ranked()
    best, metric = ranked[0], metric_name(grid.metric)
    rows = "cells" if len(grid.heads) == 1 else "rows"
    near = f"; within its 95 % interval (*): {len(near_best(ranked, grid.metric))} of {len(ranked)} {rows}"
    lines = [
        f"best: {grid.title(best)}, {metric} {best.value(grid.metric):.4f} on {best.n} images of val"
        f"{near if len(ranked) > 1 else ''}"
    ]
    used = {"train": best.trained, "val": best.n}
    given = {split: len(index) for split, index in outcome.splits.as_dict().items()}
    bad = {split: given[split] - n for split, n in used.items() if n is not None and n != given[split]}
    if bad:
        lines.append(f"images that can't be used: {', '.join(f'{n} of {split}' for split, n in bad.items())}")
    if best.kind not in STARTABLE:
        first = startable(grid)
        kind = first.kind if first.kind in STARTABLE else "linear"
        lines.append(
            f"best.yaml begins with {first.cell.title}, {kind} head, whose figure differs: a {best.kind} head is only "
            f"compared"
        )
    estimate = outcome.estimate
    if estimate is not None:
        between = (
            "" if estimate.interval is None else f", 95 % {estimate.interval[0]:.3f} to {estimate.interval[1]:.3f}"
        )
        lines.append(f"to expect: {metric} {estimate.value:.4f}{between}, by {estimate.n} {estimate.method}")
    else:
        lines.append(f"{chosen_by_it(len(ranked), grid.metric)}; no other figure: {outcome.no_estimate}")
    if outcome.pruning is not None:
        pruned = [score.cell.name for score in outcome.pruning.scores[outcome.pruning.keep :]]
        lines.append(f"pruned by LogME: {listed(pruned, 8)}")
    if grid.left:
        lines.append(f"not tried, for lack of time: {len(grid.left)} of {len(grid.cells)} cells")
    return [*lines, f"{duration(outcome.seconds)} on {outcome.ranks} {'rank' if outcome.ranks == 1 else 'ranks'}"]
