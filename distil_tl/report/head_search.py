"""Results of the head search: the metric on val of each head, by learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distil_tl.report import text
from distil_tl.report.load import Run, mapping
from distil_tl.report.markup import Child, Markup, h
from distil_tl.report.tables import table
from distil_tl.report.text import number

MAX_DRAWN = 60  # rows or columns of a heat map; of a larger grid only the best heads are listed
LISTED = 15
WIDTH, HEIGHT = 52, 28  # of a cell, in pixels
LEFT, TOP = 74, 40  # space for the labels, in pixels

Cells = dict[tuple[float, float], float | None]  # (learning rate, weight decay): the metric, None if not finite


def search_maps(run: Run) -> list[Markup]:
    """A heat map, or a list of the best heads, for each stage with a head search."""
    stages = mapping(run.summary, "stages")
    maps = []
    for name in stages:
        search = mapping(mapping(stages, name), "search")
        chosen = (number(search.get("lr")), number(search.get("weight_decay")))
        # Heads of earlier versions have no other figure than top-1.
        metric = run.metric if number(search.get(run.metric)) is not None else "top1"
        if cells := _cells(search.get("heads"), metric):
            maps.append(h("div", h("h3", f"Stage {name}"), _heat_map(cells, chosen, metric), _choice(search)))
    return maps


def fit_tables(run: Run) -> list[Markup]:
    """The settings that were tried, for each stage that fits its head."""
    stages = mapping(run.summary, "stages")
    tables = []
    for name in stages:
        fit = mapping(mapping(stages, name), "fit")
        if isinstance(fit.get("heads"), list):
            shown = path_table(fit["heads"], fit, run.metric)
            tables.append(h("div", h("h3", f"Stage {name}: {fit.get('head')}"), shown))
    return tables


def head_map(heads: object, chosen: tuple[float, float], metric: str) -> Markup:
    """A heat map of a metric, or a list of the best heads, for the heads of a search."""
    return _heat_map(_cells(heads, metric), chosen, metric)


def path_table(heads: object, chosen: dict[str, Any], metric: str) -> Markup:
    """The settings of fitted heads with their figures; a star for the chosen one."""
    found = [head for head in heads if isinstance(head, dict)] if isinstance(heads, list) else []
    star, own = h("span", "*", class_="tag"), text.settings_of(chosen)
    shown = list(dict.fromkeys([metric, "loss"]))
    rows: Sequence[Sequence[Child]] = [
        [
            [text.settings_of(head), star if text.settings_of(head) == own else None],
            *(text.figure(each, number(head.get(each))) for each in shown),
        ]
        for head in found
    ]
    names = [f"Val {text.metric_name(each)}" for each in shown]
    return table(["Setting", *names], rows, label="Settings of the head")


def _choice(search: dict[str, Any]) -> Markup | None:
    """How the head was chosen, if it need not be the best one."""
    error, near = number(search.get("standard_error")), number(search.get("near"))
    best = mapping(search, "best")
    if error is None or near is None or search.get("prefer") != "regularized":
        return None
    lr, decay = (text.tick(number(best.get(key)) or 0) for key in ("lr", "weight_decay"))
    return h(
        "p",
        f"Chosen: the most regularized of {near:.0f} within one standard error ({error * 100:.1f} points) of the best, "
        f"lr {lr} with weight decay {decay}.",
    )


def _cells(heads: object, metric: str) -> Cells:
    cells: Cells = {}
    for head in heads if isinstance(heads, list) else []:
        if isinstance(head, dict):
            lr, decay = number(head.get("lr")), number(head.get("weight_decay"))
            if lr is not None and decay is not None:
                cells.setdefault((lr, decay), number(head.get(metric)))
    return cells


def _heat_map(cells: Cells, chosen: tuple[float | None, float | None], metric: str) -> Markup:
    rates, decays = (list(dict.fromkeys(column)) for column in zip(*cells, strict=True))
    if max(len(rates), len(decays)) > MAX_DRAWN:
        return _best_heads(cells, metric)
    scores = [value for value in cells.values() if value is not None] or [0.0]
    span = (max(scores), min(scores)) if metric == "loss" else (min(scores), max(scores))
    columns, height = len(decays) * WIDTH, TOP + len(rates) * HEIGHT + 4
    width = LEFT + max(columns + 8, columns // 2 + 44)  # with one column the title is wider
    best = f"{text.tick(chosen[0] or 0)} with weight decay {text.tick(chosen[1] or 0)}"
    picture = h(
        "svg",
        h("title", "Head search"),
        h(
            "desc",
            f"{text.capitalized(text.metric_name(metric))} on val; rows are learning rates, columns weight decays. "
            f"Chosen: learning rate {best}.",
        ),
        h("text", "lr", x=LEFT - 8, y=32, class_="tick y"),
        h("text", "weight decay", x=LEFT + len(decays) * WIDTH / 2, y=14, class_="tick x"),
        [h("text", text.tick(d), x=LEFT + (j + 0.5) * WIDTH, y=32, class_="tick x") for j, d in enumerate(decays)],
        [h("text", text.tick(r), x=LEFT - 8, y=TOP + i * HEIGHT + 18, class_="tick y") for i, r in enumerate(rates)],
        [
            _cell(_Head((rate, decay), cells.get((rate, decay)), (rate, decay) == chosen), metric, span, i, j)
            for i, rate in enumerate(rates)
            for j, decay in enumerate(decays)
        ],
        role="img",
        class_="heat",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
    )
    return h("div", picture, class_="scroll", tabindex="0", role="region", aria_label="Head search")


class _Head(NamedTuple):
    """Learning rate and weight decay of a head, its figure, and whether it was chosen."""

    settings: tuple[float, float]
    value: float | None
    is_chosen: bool


def _cell(head: _Head, metric: str, span: tuple[float, float], row: int, column: int) -> list[Markup]:
    """A square of the map.

    Args:
        span: the worst and the best figure.
    """
    value, x, y = head.value, LEFT + column * WIDTH, TOP + row * HEIGHT
    # Colours range from the worst to the best figure, which may be close; the square emphasises the best ones.
    share = 0.0 if value is None else ((value - span[0]) / ((span[1] - span[0]) or 1.0)) ** 2
    shown = text.MISSING if value is None else f"{value:.3g}" if metric == "loss" else f"{value * 100:.1f}"
    rate, decay = map(text.tick, head.settings)
    title = f"lr {rate}, weight decay {decay}: {text.metric_name(metric)} {text.figure(metric, value)}"
    square = h(
        "rect",
        h("title", title),
        class_="right chosen" if head.is_chosen else "right",
        x=x + 1, y=y + 1, width=WIDTH - 2, height=HEIGHT - 2, rx="2",
        fill_opacity=round(0.06 + 0.94 * share, 3),
    )  # fmt: skip
    label = h("text", shown, x=x + WIDTH / 2, y=y + 18, class_="count strong" if share > 0.6 else "count")
    return [square, label]


def _best_heads(cells: Cells, metric: str) -> Markup:
    known = [(value, pair) for pair, value in cells.items() if value is not None]
    scored = sorted(known, key=lambda each: each[0] if metric == "loss" else -each[0])
    rows: Sequence[Sequence[Child]] = [
        [text.tick(rate), text.tick(decay), text.figure(metric, value)] for value, (rate, decay) in scored[:LISTED]
    ]
    name = f"Val {text.metric_name(metric)}"
    return table(["Learning rate", "Weight decay", name], rows, label=f"The best {LISTED} of {len(cells)} heads")
