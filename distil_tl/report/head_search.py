"""Results of the head search: val top-1 of each head, by learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distil_tl.report import text
from distil_tl.report.load import Run, mapping
from distil_tl.report.markup import Child, Markup, h
from distil_tl.report.tables import table
from distil_tl.report.text import number

MAX_DRAWN = 60  # rows or columns of a heat map; of a larger grid only the best heads are listed
LISTED = 15
WIDTH, HEIGHT = 52, 28  # of a cell, in pixels
LEFT, TOP = 74, 40  # space for the labels, in pixels

Cells = dict[tuple[float, float], float | None]  # (learning rate, weight decay): top-1, None if not finite


def search_maps(run: Run) -> list[Markup]:
    """A heat map, or a list of the best heads, for each stage with a head search."""
    stages = mapping(run.summary, "stages")
    maps = []
    for name in stages:
        search = mapping(mapping(stages, name), "search")
        cells = _cells(search.get("heads"))
        if cells:
            chosen = (number(search.get("lr")), number(search.get("weight_decay")))
            maps.append(h("div", h("h3", f"Stage {name}"), _heat_map(cells, chosen), _choice(search)))
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
    return _heat_map(_cells(heads, metric), chosen)


def path_table(heads: object, chosen: dict[str, Any], metric: str) -> Markup:
    """The settings of fitted heads with their figures; a star for the chosen one."""
    found = [head for head in heads if isinstance(head, dict)] if isinstance(heads, list) else []
    star, own = h("span", "*", class_="tag"), text.settings_of(chosen)
    rows: Sequence[Sequence[Child]] = [
        [
            [text.settings_of(head), star if text.settings_of(head) == own else None],
            text.decimal(number(head.get(metric))) if metric == "loss" else text.percent(number(head.get(metric))),
            text.decimal(number(head.get("loss"))),
        ]
        for head in found
    ]
    name = text.METRIC_NAMES.get(metric, metric)
    return table(["Setting", f"Val {name}", "Val loss"], rows, label="Settings of the head")


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


def _cells(heads: object, metric: str = "top1") -> Cells:
    cells: Cells = {}
    for head in heads if isinstance(heads, list) else []:
        if isinstance(head, dict):
            lr, decay = number(head.get("lr")), number(head.get("weight_decay"))
            if lr is not None and decay is not None:
                cells.setdefault((lr, decay), number(head.get(metric)))
    return cells


def _heat_map(cells: Cells, chosen: tuple[float | None, float | None]) -> Markup:
    rates, decays = (list(dict.fromkeys(column)) for column in zip(*cells, strict=True))
    if max(len(rates), len(decays)) > MAX_DRAWN:
        return _best_heads(cells)
    scores = [value for value in cells.values() if value is not None] or [0.0]
    span = min(scores), max(scores)
    columns, height = len(decays) * WIDTH, TOP + len(rates) * HEIGHT + 4
    width = LEFT + max(columns + 8, columns // 2 + 44)  # with one column the title is wider
    best = f"{text.tick(chosen[0] or 0)} with weight decay {text.tick(chosen[1] or 0)}"
    picture = h(
        "svg",
        h("title", "Head search"),
        h("desc", f"Top-1 on val; rows are learning rates, columns weight decays. Chosen: learning rate {best}."),
        h("text", "lr", x=LEFT - 8, y=32, class_="tick y"),
        h("text", "weight decay", x=LEFT + len(decays) * WIDTH / 2, y=14, class_="tick x"),
        [h("text", text.tick(d), x=LEFT + (j + 0.5) * WIDTH, y=32, class_="tick x") for j, d in enumerate(decays)],
        [h("text", text.tick(r), x=LEFT - 8, y=TOP + i * HEIGHT + 18, class_="tick y") for i, r in enumerate(rates)],
        [
            _cell(cells, span, (rate, decay), LEFT + j * WIDTH, TOP + i * HEIGHT, (rate, decay) == chosen)
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


def _cell(
    cells: Cells, span: tuple[float, float], settings: tuple[float, float], x: int, y: int, is_chosen: bool
) -> list[Markup]:
    top1 = cells.get(settings)
    # Colours range from the worst to the best top-1, which may be close; the square emphasises the best ones.
    share = 0.0 if top1 is None else ((top1 - span[0]) / ((span[1] - span[0]) or 1.0)) ** 2
    shown = text.MISSING if top1 is None else f"{top1 * 100:.1f}"
    title = f"lr {text.tick(settings[0])}, weight decay {text.tick(settings[1])}: top-1 {text.percent(top1)}"
    square = h(
        "rect",
        h("title", title),
        class_="right chosen" if is_chosen else "right",
        x=x + 1, y=y + 1, width=WIDTH - 2, height=HEIGHT - 2, rx="2",
        fill_opacity=round(0.06 + 0.94 * share, 3),
    )  # fmt: skip
    label = h("text", shown, x=x + WIDTH / 2, y=y + 18, class_="count strong" if share > 0.6 else "count")
    return [square, label]


def _best_heads(cells: Cells) -> Markup:
    scored = sorted(((top1, pair) for pair, top1 in cells.items() if top1 is not None), key=lambda each: -each[0])
    rows: Sequence[Sequence[Child]] = [
        [text.tick(rate), text.tick(decay), text.percent(top1)] for top1, (rate, decay) in scored[:LISTED]
    ]
    return table(["Learning rate", "Weight decay", "Val top-1"], rows, label=f"The best {LISTED} of {len(cells)} heads")
