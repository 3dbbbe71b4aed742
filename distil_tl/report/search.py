"""What the searches before stages have found: top-1 on val over learning rates and weight decays."""

from __future__ import annotations

from collections.abc import Sequence

from distil_tl.report import text
from distil_tl.report.load import Run, section
from distil_tl.report.markup import Child, Markup, h
from distil_tl.report.tables import table
from distil_tl.report.text import number

MAX_DRAWN = 60  # rows or columns; of a larger grid the best heads are listed
LISTED = 15
WIDTH, HEIGHT, EDGE = 52, 28, 74  # of a cell, and of the labels beside it

Cells = dict[tuple[float, float], float | None]  # (learning rate, weight decay): top-1, if it was finite


def search_maps(run: Run) -> list[Markup]:
    """A map for each stage that was searched for."""
    stages = section(run.summary, "stages")
    found = []
    for name in stages:
        search = section(section(stages, name), "search")
        cells = _cells(search.get("heads"))
        if cells:
            chosen = (number(search.get("lr")), number(search.get("weight_decay")))
            found.append(h("div", h("h3", f"Stage {name}"), _drawn(cells, chosen)))
    return found


def _cells(heads: object) -> Cells:
    cells: Cells = {}
    for head in heads if isinstance(heads, list) else []:
        if isinstance(head, dict):
            lr, decay = number(head.get("lr")), number(head.get("weight_decay"))
            if lr is not None and decay is not None:
                cells.setdefault((lr, decay), number(head.get("top1")))
    return cells


def _drawn(cells: Cells, chosen: tuple[float | None, float | None]) -> Markup:
    rates, decays = (list(dict.fromkeys(column)) for column in zip(*cells, strict=True))
    if max(len(rates), len(decays)) > MAX_DRAWN:
        return _best(cells)
    known = [value for value in cells.values() if value is not None] or [0.0]
    span = min(known), max(known)
    width, height = EDGE + len(decays) * WIDTH + 8, 40 + len(rates) * HEIGHT + 4
    best = f"{text.tick(chosen[0] or 0)} with weight decay {text.tick(chosen[1] or 0)}"
    picture = h(
        "svg",
        h("title", "Search"),
        h("desc", f"Top-1 on val; rows are learning rates, columns weight decays. The best is {best}."),
        h("text", "lr", x=EDGE - 8, y=32, class_="tick y"),
        h("text", "weight decay", x=EDGE + len(decays) * WIDTH / 2, y=14, class_="tick x"),
        [h("text", text.tick(d), x=EDGE + (j + 0.5) * WIDTH, y=32, class_="tick x") for j, d in enumerate(decays)],
        [h("text", text.tick(r), x=EDGE - 8, y=40 + i * HEIGHT + 18, class_="tick y") for i, r in enumerate(rates)],
        [
            _cell(cells, span, (rate, decay), EDGE + j * WIDTH, 40 + i * HEIGHT, (rate, decay) == chosen)
            for i, rate in enumerate(rates)
            for j, decay in enumerate(decays)
        ],
        role="img",
        class_="heat",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
    )
    return h("div", picture, class_="scroll", tabindex="0", role="region", aria_label="Search")


def _cell(
    cells: Cells, span: tuple[float, float], settings: tuple[float, float], x: int, y: int, is_chosen: bool
) -> list[Markup]:
    top1 = cells.get(settings)
    # From the worst to the best, as all of them may be close; the square tells the best apart.
    share = 0.0 if top1 is None else ((top1 - span[0]) / ((span[1] - span[0]) or 1.0)) ** 2
    shown = text.NOTHING if top1 is None else f"{top1 * 100:.1f}"
    title = f"lr {text.tick(settings[0])}, weight decay {text.tick(settings[1])}: top-1 {text.percent(top1)}"
    square = h(
        "rect",
        h("title", title),
        class_="right chosen" if is_chosen else "right",
        x=x + 1, y=y + 1, width=WIDTH - 2, height=HEIGHT - 2, rx="2",
        fill_opacity=round(0.06 + 0.94 * share, 3),
    )  # fmt: skip
    number_in_it = h("text", shown, x=x + WIDTH / 2, y=y + 18, class_="count strong" if share > 0.6 else "count")
    return [square, number_in_it]


def _best(cells: Cells) -> Markup:
    scored = sorted(((top1, pair) for pair, top1 in cells.items() if top1 is not None), key=lambda each: -each[0])
    rows: Sequence[Sequence[Child]] = [
        [text.tick(rate), text.tick(decay), text.percent(top1)] for top1, (rate, decay) in scored[:LISTED]
    ]
    return table(["Learning rate", "Weight decay", "Val top-1"], rows, label=f"The best {LISTED} of {len(cells)}")
