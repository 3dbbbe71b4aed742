"""The work of `distil-tl select`: plan the cells, search one after another, and write the files."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distil_tl.auto_settings import settle_auto, settle_views
from distil_tl.cli.selection_checks import (
    example_of_best,
    named_models,
    prefetch_command,
    refuse_none_usable,
    without_models,
)
from distil_tl.cli.selection_table import SHOWN_ROWS, Live, effect_table, headline, result_table
from distil_tl.config import Config, check, problems
from distil_tl.data.splits import Splits, copy_to_local_disk, open_splits
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.preemption import Agreement, AllRanksStopError, Request, StopSignal
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.models.config import ModelConfig
from distil_tl.report.selection import render_selection
from distil_tl.rundir.lock import Attempt
from distil_tl.selection.best_config import best_config, later_stages, to_text
from distil_tl.selection.candidates import Found, locate
from distil_tl.selection.cell_search import CellSearch, UnfitError
from distil_tl.selection.cells import Cell, Estimate, Grid, Result, startable
from distil_tl.selection.common import Common
from distil_tl.selection.config import GridConfig
from distil_tl.selection.estimate import NoEstimateError, estimate
from distil_tl.selection.outcome import (
    Outcome,
    claimed,
    read_result,
    save_cell,
    save_estimate,
    saved_cells,
    saved_estimate,
)
from distil_tl.selection.plan import plan_cells
from distil_tl.selection.pruning import prune
from distil_tl.training.config import rank_by
from distil_tl.training.features import FeaturesNeededError
from distil_tl.training.precision import set_rounding
from distil_tl.utils.args import plain, refuse
from distil_tl.utils.errors import PreemptedError, UserError, listed
from distil_tl.utils.files import write_atomic, write_json, writing
from distil_tl.utils.job_outcome import SAVED, note
from distil_tl.utils.log import logger, printable, setup_console


def select(grid: GridConfig, config: Config, unresolved: DictConfig, out: Path, budget: float | None) -> None:
    """Compare all cells of the grid, or as many as the budget permits. Raises as `cli.select.run`.

    Args:
        unresolved: the configuration with its interpolations unresolved.
        out: the folder of the results.
        budget: seconds.
    """
    began = time.monotonic()
    launch = read_launch(os.environ)
    setup_console(launch.rank == 0)
    names, model = named_models(grid, config)
    checked = without_models(config)
    check(checked, launch.world_size)
    set_rounding(tf32=config.tf32, deterministic=config.deterministic)
    with (
        StopSignal("the selection started") as stop,
        init_distributed(launch, config.distributed) as info,
        claimed(info, out) as lock,
    ):
        found = Found(**_located(on_rank_zero(info, "looking for weights", lambda: asdict(locate(names, model)))))
        refuse_none_usable(found)
        on_rank_zero(
            info, "checking best.yaml",
            lambda: refuse(list(problems(example_of_best(config, unresolved, found.usable[0]), info.world_size))),
        )  # fmt: skip
        splits = open_splits(info, config.data)
        common = _common(info, config, checked, model, splits, settles_crop=not grid.crops)
        planned = on_rank_zero(
            info, "planning the cells",
            lambda: _planned(
                *plan_cells(found.usable, grid, common, splits, info.device.type), out, grid.heads, config.metric
            ),
        )  # fmt: skip
        cells = [Cell(**cell) for cell in planned["cells"]]
        splits = copy_to_local_disk(info, config.data, splits)
        work = Grid(cells, config.metric, heads=grid.heads)
        work.results += [read_result(cell, tree) for cell in cells for tree in planned["saved"].get(cell.digest, [])]
        outcome = Outcome(
            work, splits, found.missing, found.unusable | planned["left_out"], info.device.type, info.world_size, budget
        )
        stop.defer()
        agreement = Agreement(info, lambda: Request.STOP if stop else Request.CONTINUE)
        search = CellSearch(info, common, splits, agreement, cells)
        selection = _Selection(info, out, lock, outcome, search, began)
        try:
            if grid.keep is not None:
                outcome.pruning = prune(search, work, grid.keep, out)
            selection.run(budget)
            selection.finish((config, unresolved), (common.stage, common.config))
        except AllRanksStopError:
            info.leave(orderly=True, seconds=None)
            raise PreemptedError(
                f"stopped by a signal; {work.complete} of {len(work.cells)} cells are saved in {out}. Run the same "
                f"command to resume"
            ) from None


def _common(
    info: DistInfo, config: Config, checked: Config, model: ModelConfig, splits: Splits, *, settles_crop: bool
) -> Common:
    """The settings of all cells, with values in place of `auto`.

    Args:
        checked: as `without_models` gives it.
        settles_crop: whether the crop is the configured one.
    """
    settled, _ = settle_auto(checked, len(splits.train), {}, info.world_size)
    if settles_crop:
        settled, _ = settle_views(info, settled, splits.train, {})
    ((name, stage),) = settled.stages.items()
    return Common(
        name, stage, model, settled.data, config.optim, config.metric, config.precision, config.seed,
        tf32=config.tf32, deterministic=config.deterministic, later=later_stages(config.stages),
    )  # fmt: skip


@dataclass
class _Selection:
    """A selection in progress. Only rank 0 writes."""

    info: DistInfo
    folder: Path
    lock: Attempt
    outcome: Outcome
    search: CellSearch
    began: float
    timed: list[tuple[Cell, float]] = field(default_factory=list)  # the seconds of the cells of this call

    def run(self, budget: float | None) -> None:
        """Search the cells that are left. Raises as `CellSearch.search`, but for networks that can't be used."""
        grid = self.outcome.grid
        with Live(grid, show=self.info.is_main) as live:
            while (cell := grid.following()) is not None:
                if budget is not None and self.timed and not self.fits(cell, budget):
                    logger.info("the budget is spent; not tried: %d of %d cells", len(grid.left), len(grid.cells))
                    return
                live.begin(cell)
                began, before = time.monotonic(), len(grid.results)
                try:
                    reasons = self.search.search(cell, grid.missing(cell), self.keep)
                except UnfitError as error:
                    grid.fail(cell, str(error))
                    live.failed(cell, str(error))
                    continue
                self.timed.append((cell, time.monotonic() - began))
                grid.failed_heads |= {(cell, kind): reason for kind, reason in reasons.items()}
                if results := grid.results[before:]:
                    live.end(min(results, key=lambda result: rank_by(grid.metric, result.head)))
                else:
                    live.failed(cell, "; ".join(dict.fromkeys(reasons.values())))

    def keep(self, result: Result) -> None:
        """Add a result, and save it."""

        def save() -> None:
            self.lock.check()
            save_cell(self.folder, result)

        self.outcome.grid.results.append(result)
        on_rank_zero(self.info, "saving a result", save)
        if self.info.is_main:
            note(SAVED)  # the job has made progress

    def fits(self, cell: Cell, budget: float) -> bool:
        """Whether a cell would probably end within the budget, by the costliest one so far; equal on all ranks."""
        counted = [timed for timed in self.timed if timed[0].multiply_adds is not None] or self.timed
        known, expected = max(counted, key=lambda timed: (timed[0].cost, timed[1]))
        if cell.multiply_adds is not None and known.multiply_adds:
            expected *= max(1.0, cell.multiply_adds / known.multiply_adds)
        spent = time.monotonic() - self.began
        return bool(on_rank_zero(self.info, "checking the budget", lambda: spent + expected <= budget))

    def finish(self, given: tuple[Config, DictConfig], head: tuple[str, Any]) -> None:
        """Find out how good the best cell is, and write and print the result."""
        outcome, grid = self.outcome, self.outcome.grid
        if not grid.results:
            reasons = [f"{name}: {reason}" for name, reason in (outcome.left_out | grid.reasons()).items()]
            raise UserError(f"no backbone can be used: {'; '.join(reasons or ['the budget is too short for one'])}")
        best = startable(grid)
        saved = on_rank_zero(self.info, "looking for an estimate", lambda: saved_estimate(self.folder, best))
        if saved is not None:
            outcome.estimate = Estimate(**saved)
        else:
            logger.info("\nestimate for %s", grid.title(best))
            outcome.no_estimate = "it was not computed yet"
            on_rank_zero(self.info, "writing the result so far", lambda: self.write(given, head))
            outcome.estimate, outcome.no_estimate = self.estimated(best)
        on_rank_zero(self.info, "writing the result", lambda: self.write(given, head))
        if self.info.is_main:
            logger.info("\n%s\n", result_table(grid, SHOWN_ROWS))
            if len(grid.results) > SHOWN_ROWS:
                logger.info("and %d more rows, in select.html\n", len(grid.results) - SHOWN_ROWS)
            if found := effect_table(outcome):
                logger.info("%s\n", found)
            for line in headline(outcome):
                logger.info("%s", line)
            print_missing(outcome)
            quoted = shlex.quote(str(self.folder / "best.yaml"))
            logger.info(
                "\nresults are in %s: open select.html\ntrain: distil-tl train %s", printable(self.folder), quoted
            )

    def estimated(self, best: Result) -> tuple[Estimate | None, str | None]:
        """The estimate for the best cell, which is saved; or the reason why there is none."""
        try:
            opened = self.search.open_cell(best.cell)
            found = estimate(self.info, opened, best, self.search.agreement)
        except NoEstimateError as error:
            return None, str(error)
        except UserError as error:  # features that are not there any more, and no space for new ones
            if not self.search.is_of_cell(error):
                raise
            return None, str(error.reason if isinstance(error, FeaturesNeededError) else error)
        on_rank_zero(self.info, "saving an estimate", lambda: save_estimate(self.folder, best, found))
        return found, None

    def write(self, given: tuple[Config, DictConfig], head: tuple[str, Any]) -> None:
        """Write select.json, select.html and best.yaml."""
        self.lock.check()
        self.outcome.seconds = time.monotonic() - self.began
        config, unresolved = given
        defaults = plain(OmegaConf.structured(Config))
        tree = best_config(plain(unresolved), defaults, config.stages, head, startable(self.outcome.grid))
        quoted = shlex.quote(str(self.folder / "best.yaml"))
        lines = ["Chosen by distil-tl select.", *headline(self.outcome), "", f"  python -m distil_tl.train {quoted}"]
        content = self.outcome.to_json()
        page = render_selection(content, self.folder.resolve().name, str(self.folder / "best.yaml"))
        with writing(self.folder):
            write_json(self.folder / "select.json", content)
            write_atomic(self.folder / "select.html", str(page))
            write_atomic(self.folder / "best.yaml", to_text(tree, "\n".join(lines)))


def print_missing(outcome: Outcome) -> None:
    """The backbones that were not tried, with reasons and the command that downloads weights."""
    for name, reason in (outcome.left_out | outcome.grid.reasons()).items():
        logger.info("left out: %s: %s", name, reason)
    if outcome.missing:
        names = list(outcome.missing)
        logger.info(
            "\nnot tried, as the weights are not on this machine: %s. To download them, where there is a network:\n%s",
            listed(names, 8), prefetch_command(names),
        )  # fmt: skip


def _located(tree: dict[str, Any]) -> dict[str, Any]:
    """`Found` after JSON."""
    return {**tree, "usable": [ModelConfig(**model) for model in tree["usable"]]}


def _planned(
    cells: list[Cell], left_out: dict[str, str], folder: Path, heads: list[str], metric: str
) -> dict[str, Any]:
    """What rank 0 plans, for JSON."""
    saved = saved_cells(folder, cells, heads, metric)
    return {"cells": [asdict(cell) for cell in cells], "left_out": left_out, "saved": saved}
