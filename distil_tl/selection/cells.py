"""A cell of the grid, its result, and the order in which cells are tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distil_tl.selection.config import STARTABLE
from distil_tl.training.config import rank_by
from distil_tl.utils.intervals import Interval, wilson

SHARES = ("top1", "top5")  # metrics that are shares of the images, for which Wilson's interval is exact in meaning


@dataclass(frozen=True)
class Cell:
    """A backbone, an image size, a crop and a read-out.

    Attributes:
        name, weights: as `model.name` and `model.weights`.
        image_size: pixels.
        crop_mode: as `data.crop_mode`.
        parameters: of the model with its head.
        multiply_adds: for one image; None if unknown.
        digest: of everything that its result depends on.
        readout: as `model.readout`.
    """

    name: str
    weights: str
    image_size: int
    crop_mode: str
    parameters: int
    multiply_adds: int | None
    digest: str = ""
    readout: str = "pooled"

    @property
    def network(self) -> tuple[str, int]:
        """The backbone and the size, which several cells share."""
        return self.name, self.image_size

    @property
    def passes(self) -> tuple[str, int, str]:
        """The forward passes, which read-outs share."""
        return *self.network, self.crop_mode

    @property
    def cost(self) -> float:
        """The multiply-adds, to compare cells by; infinite if unknown."""
        return float("inf") if self.multiply_adds is None else float(self.multiply_adds)

    @property
    def title(self) -> str:
        return f"{self.name} {self.image_size} px {self.crop_mode}{self.other_readout}"

    @property
    def other_readout(self) -> str:
        """The read-out after a space, if it is another than pooled."""
        return "" if self.readout == "pooled" else f" {self.readout}"


@dataclass(frozen=True)
class Result:
    """What a cell gave, on val.

    Attributes:
        source: of the weights.
        n: usable images of val.
        head: the chosen head: its settings and figures.
        heads: those of all heads.
        precision: of the frozen part.
        features: numbers for each image.
        images_per_second: of all ranks, in forward passes of the frozen part; None if memory does not suffice for them.
        seconds: for features and heads; of several kinds of heads the first one has those for features.
        kind: of the head, as in `heads`.
        other_interval: 95 %, of a metric that is no share of images; None where there are too many classes for one.
        trained: usable images of train; None in results of earlier versions.
    """

    cell: Cell
    source: str
    n: int
    head: dict[str, Any]
    heads: list[dict[str, Any]]
    precision: str
    features: int
    images_per_second: float | None
    seconds: float
    kind: str = "linear"
    other_interval: Interval | None = None
    trained: int | None = None

    def value(self, metric: str) -> float:
        return float(self.head[metric])

    def interval(self, metric: str) -> Interval | None:
        """The 95 % interval of the metric."""
        return share_interval(metric, self.value(metric), self.n) if metric in SHARES else self.other_interval


def share_interval(metric: str, value: float, n: int) -> Interval | None:
    """Wilson's interval of a metric that is a share of images; None for others."""
    return wilson(round(value * n), n) if metric in SHARES else None


def metric_interval(metric: str, figures: Mapping[str, Any], n: int) -> Interval | None:
    """The 95 % interval of the metric, from the result of a head on `n` images."""
    spread = figures.get("spread")
    return share_interval(metric, figures[metric], n) if spread is None else spread.interval(metric)


@dataclass(frozen=True)
class Estimate:
    """A figure of the chosen backbone and head.

    Attributes:
        split: whose images it is of.
        method: how they were kept apart, in words.
        n: images.
        metric: its name.
        interval: 95 %; None where there are too many classes for one.
    """

    split: str
    method: str
    n: int
    metric: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Score:
    """LogME of a backbone.

    Attributes:
        cell: whose features were used.
        images: of train.
        seconds: for their features.
    """

    cell: Cell
    value: float
    images: int
    seconds: float


@dataclass(frozen=True)
class Pruning:
    """The backbones by LogME, the best first, of which the first `keep` are searched."""

    keep: int
    scores: list[Score]


@dataclass
class Grid:
    """The cells that are left, and the results so far: one for each kind of head in each cell."""

    cells: Sequence[Cell]
    metric: str
    results: list[Result] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    heads: Sequence[str] = ("linear",)
    failed_heads: dict[tuple[Cell, str], str] = field(default_factory=dict)

    @property
    def left(self) -> list[Cell]:
        done = self._done()
        return [cell for cell in self.cells if cell not in self.failed and not done[cell].issuperset(self.heads)]

    @property
    def complete(self) -> int:
        """Cells that have results, and none is missing."""
        saved = {result.cell for result in self.results}
        return len(saved.difference(self.left).intersection(self.cells))

    def missing(self, cell: Cell) -> list[str]:
        """The kinds of heads of a cell that have no result and have not failed."""
        done = self._done()[cell]
        return [kind for kind in self.heads if kind not in done]

    def _done(self) -> dict[Cell, set[str]]:
        """By cell, the kinds of heads that have a result or have failed."""
        done = defaultdict[Cell, set[str]](set)
        for result in self.results:
            done[result.cell].add(result.kind)
        for cell, kind in self.failed_heads:
            done[cell].add(kind)
        return done

    def title(self, result: Result) -> str:
        """The cell of a result, with its head where several are compared."""
        return result.cell.title if len(self.heads) == 1 else f"{result.cell.title}, {result.kind} head"

    def following(self) -> Cell | None:
        """The most promising cell: of each backbone one first, the cheapest first; then those of the best backbones.

        Read-outs that share the forward passes of the last result come before all others.
        """
        left = self.left
        if self.results:
            beside = [cell for cell in left if cell.passes == self.results[-1].cell.passes]
            if beside:
                return beside[0]
        if not left:
            return None
        tried = {cell.name for cell in (*self.failed, *(cell for cell, _ in self.failed_heads))}
        best: dict[str, tuple[float, float]] = {}
        for result in self.results:
            rank = rank_by(self.metric, result.head)
            best[result.cell.name] = min(rank, best.get(result.cell.name, rank))
        new = [cell for cell in left if cell.name not in best and cell.name not in tried]
        if new:
            return min(new, key=lambda cell: cell.cost)
        worst = (float("inf"), float("inf"))
        return min(left, key=lambda cell: best.get(cell.name, worst))

    def fail(self, cell: Cell, reason: str) -> None:
        """A network that can't be used at a size: it is left out with every crop and read-out.

        If the cell has results, those of earlier calls, only its other heads are left out.
        """
        if any(result.cell == cell for result in self.results):
            self.failed_heads |= {(cell, kind): reason for kind in self.missing(cell)}
            return
        self.failed |= {each: reason for each in self.left if each.network == cell.network}

    def reasons(self) -> dict[str, str]:
        """Why networks and heads failed, by their names."""
        networks = {f"{cell.name} {cell.image_size} px": reason for cell, reason in self.failed.items()}
        heads = {f"{cell.title}, {kind} head": reason for (cell, kind), reason in self.failed_heads.items()}
        return networks | heads

    def ranked(self) -> list[Result]:
        """The results, the best first; of equal ones the cheaper first."""
        position = {cell: i for i, cell in enumerate(self.cells)}

        def key(result: Result) -> tuple[float, float, float, int, int]:
            return (
                *rank_by(self.metric, result.head), result.cell.cost, position[result.cell],
                self.heads.index(result.kind),
            )  # fmt: skip

        return sorted(self.results, key=key)


def startable(grid: Grid) -> Result:
    """The best result with a head that a run can begin with; if there is none, the best one."""
    ranked = grid.ranked()
    return next((result for result in ranked if result.kind in STARTABLE), ranked[0])


def pareto(results: Sequence[Result]) -> Iterator[Result]:
    """Of results with the best first: those that no cheaper one reaches, by multiply-adds."""
    lowest = float("inf")
    for result in results:
        cost = result.cell.multiply_adds
        if cost is not None and cost < lowest:
            lowest = cost
            yield result


def near_best(results: Sequence[Result], metric: str) -> list[Result]:
    """Of results with the best first: those within the 95 % interval of the best; the best alone where it has none."""
    interval = results[0].interval(metric)
    if interval is None:
        return list(results[:1])
    if metric == "loss":
        return [result for result in results if result.value(metric) <= interval[1]]
    return [result for result in results if result.value(metric) >= interval[0]]
