"""Accuracy on test against time, a panel for each task, as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.svg_style import STYLE
from distil_tl.report.markup import Markup, h, join
from distil_tl.report.svg import Scale
from distil_tl.report.text import tick

WIDTH, HEIGHT = 215, 190  # pixels of a panel's plot
LEFT, GAP, BOTTOM = 52, 52, 52
COLUMNS = 3
COLORS = ("#1f9bb8", "#3fa34d", "#8a63d2", "#3b6fd4", "#e8873a", "#b5541a", "#7a8590", "#d46ab0")  # on light and dark
NOTES = ("Top-1 on test images, by seconds of a run.", "Lines: the lowest to the highest seed.")


class Point(NamedTuple):
    """A recipe on a task: mean seconds of a run, and the mean, lowest and highest top-1 of its seeds on test."""

    recipe: str
    seconds: float
    top1: float
    low: float
    high: float


def points(results: Sequence[dict[str, Any]]) -> dict[str, list[Point]]:
    """The points of each task, and each form of one."""
    panels: dict[str, list[Point]] = {}
    for task, form in dict.fromkeys((row["task"], row["form"]) for row in results):
        here = [row for row in results if (row["task"], row["form"]) == (task, form)]
        for recipe in dict.fromkeys(row["recipe"] for row in here):
            runs = [row for row in here if row["recipe"] == recipe]
            top1 = [row["test"]["top1"] for row in runs]
            seconds = statistics.mean(row["seconds"] for row in runs)
            panels.setdefault(task if form == "full" else f"{task}, {form}", []).append(
                Point(recipe, seconds, statistics.mean(top1), min(top1), max(top1))
            )
    return panels


def draw(results: Sequence[dict[str, Any]]) -> str:
    """The picture. Time is on a logarithmic scale; a line joins the lowest and the highest seed."""
    panels = points(results)
    recipes = list(dict.fromkeys(point.recipe for found in panels.values() for point in found))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(recipes)}
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    width = LEFT + columns * WIDTH + (columns - 1) * GAP + 24
    legend, top = _legend(colors, width)
    height = top + lines * (HEIGHT + BOTTOM) + (lines - 1) * 24 + 36
    described = "; ".join(
        f"{task}: " + ", ".join(f"{point.recipe} {point.top1:.3f} in {point.seconds:.0f} s" for point in found)
        for task, found in panels.items()
    )
    return str(
        h(
            "svg",
            h("title", "Top-1 on test images against seconds of training", id="title"),
            h("desc", described, id="desc"),
            h("style", Markup(STYLE)),
            h("rect", class_="panel", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=8),
            legend,
            [h("text", note, class_="soft", x=LEFT, y=height - 32 + 18 * i) for i, note in enumerate(NOTES)],
            [_panel(task, found, colors, *_corner(i, columns, top)) for i, (task, found) in enumerate(panels.items())],
            xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
            aria_labelledby="title desc", font_family="system-ui, -apple-system, 'Segoe UI', sans-serif", font_size=12,
        )
    )  # fmt: skip


def _legend(colors: dict[str, str], width: int) -> tuple[Markup, int]:
    """The names of the recipes, and the upper edge of the plots below them."""
    elements, x, y = [], LEFT, 24
    for name, color in colors.items():
        if x > LEFT and x + 16 + 7 * len(name) > width:
            x, y = LEFT, y + 22
        elements.append(h("circle", cx=x + 5, cy=y, r=5, fill=color))
        elements.append(h("text", name, class_="ink", x=x + 16, y=y + 4))
        x += 36 + 7 * len(name)
    return join(elements), y + 60


def _corner(i: int, columns: int, top: int) -> tuple[int, int]:
    """The left and the upper edge of a panel's plot."""
    return LEFT + i % columns * (WIDTH + GAP), top + i // columns * (HEIGHT + BOTTOM + 24)


def _panel(task: str, found: Sequence[Point], colors: dict[str, str], left: int, top: int) -> Markup:
    fast, slow = min(point.seconds for point in found), max(point.seconds for point in found)
    low, high = min(point.low for point in found), max(point.high for point in found)
    margin = max(0.02, 0.08 * (high - low))
    x, y = Scale(fast / 1.3, slow * 1.3, log=True), Scale(max(0.0, low - margin), min(1.0, high + margin))
    elements = [h("text", task, class_="ink", x=left, y=top - 14, font_weight=600)]
    for value in y.ticks(4):
        at = _round(top + HEIGHT * (1 - y(value)))
        elements.append(h("line", class_="grid", x1=left, x2=left + WIDTH, y1=at, y2=at))
        elements.append(h("text", f"{value:.2f}", class_="soft", x=left - 8, y=at + 4, text_anchor="end"))
    for value in x.ticks(3):
        at = _round(left + WIDTH * x(value))
        elements.append(h("line", class_="grid", x1=at, x2=at, y1=top, y2=top + HEIGHT))
        elements.append(h("text", f"{tick(value)} s", class_="soft", x=at, y=top + HEIGHT + 18, text_anchor="middle"))
    for point in found:
        at, color = _round(left + WIDTH * x(point.seconds)), colors[point.recipe]
        heights = [_round(top + HEIGHT * (1 - y(value))) for value in (point.low, point.top1, point.high)]
        said = f"{point.recipe}: top-1 {point.top1:.3f} ({point.low:.3f} to {point.high:.3f}), {point.seconds:.0f} s"
        elements.append(h("line", x1=at, x2=at, y1=heights[0], y2=heights[2], stroke=color, stroke_width=2))
        elements.append(h("circle", h("title", said), cx=at, cy=heights[1], r=5, fill=color))
    return join(elements)


def _round(value: float) -> float:
    return round(value, 1)
