"""A bar chart of the time that each package spends in each part of the job, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.measure import Results, Spread
from benchmarks.peers.summary import OFF, OURS, SOONEST, curve, final_top1
from benchmarks.svg_style import STYLE
from distil_tl.report.markup import Markup, h, join
from distil_tl.report.svg import Scale

LEFT, PLOT, RIGHT = 210, 480, 190  # pixels: names, bars, figures
TOP, ROW, BAR = 66, 34, 20

PARTS = {"start": "imports, data, model", "head": "head on a frozen backbone", "full": "everything", "end": "the end"}
COLORS = """
  .start { fill: #b1bac4 }
  .head { fill: #0a6e8a }
  .full { fill: #e8873a }
  .end { fill: #6e7781 }
  @media (prefers-color-scheme: dark) {
    .start { fill: #57606a }
    .head { fill: #58b9d6 }
    .full { fill: #d4741c }
    .end { fill: #8b949e }
  }
"""


class Part(NamedTuple):
    """A part of a process, in seconds since its start."""

    name: str
    begin: float
    end: float


def parts(run: dict[str, Any]) -> list[Part]:
    """Consecutive parts without gaps: the start, each stage with its evaluations, the end."""
    spans: list[Part] = []
    last = 0.0
    for stage in dict.fromkeys(point.stage for point in curve(run)):
        end = max(point.seconds for point in curve(run) if point.stage == stage)
        if not spans:
            begins = [e["time"] - run["began"] for e in run["events"] if e["event"] == "begin" and e["stage"] == stage]
            last = begins[0] if begins else end - run["stage_seconds"][stage]  # distil_tl records the duration
            spans.append(Part("start", 0.0, last))
        spans.append(Part(stage, last, end))
        last = end
    return [*spans, Part("end", last, run["seconds"])]


def median_parts(runs: Sequence[dict[str, Any]]) -> list[Part]:
    """The parts of a typical run: each ends at the median of its ends over all `runs`."""
    spans, last = [], 0.0
    for same in zip(*map(parts, runs), strict=True):
        end = Spread.of([part.end for part in same]).median
        spans.append(Part(same[0].name, last, end))
        last = end
    return spans


def draw_chart(results: Results, tuned: Sequence[str]) -> Markup:
    """The bars of distil_tl and of the tuned peers, the fastest first. A part ends at its median over all runs."""
    rows = {name: results.of(name) for name in (OURS, SOONEST, OFF, *tuned) if results.of(name)}
    seconds = {name: Spread.of([run["seconds"] for run in runs]).median for name, runs in rows.items()}
    order = sorted(rows, key=lambda name: seconds[name])
    scale = Scale(0.0, 1.05 * max(run["seconds"] for runs in rows.values() for run in runs))
    width, height = LEFT + PLOT + RIGHT, TOP + ROW * len(order) + 44
    labels = {name: f"{seconds[name]:.1f} s, top-1 {_median_top1(rows[name]):.3f}" for name in order}
    return h(
        "svg",
        h("title", "Seconds of the same transfer-learning job, by package", id="title"),
        h("desc", "; ".join(f"{name}: {labels[name]}" for name in order), id="desc"),
        h("style", Markup(STYLE + COLORS)),
        h("rect", class_="panel", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=8),
        _legend(),
        _axis(scale, height),
        [_row(name, labels[name], median_parts(rows[name]), TOP + ROW * i, scale) for i, name in enumerate(order)],
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
        aria_labelledby="title desc", font_family="system-ui, -apple-system, 'Segoe UI', sans-serif", font_size=13,
    )  # fmt: skip


def _median_top1(runs: Sequence[dict[str, Any]]) -> float:
    return Spread.of([final_top1(run) for run in runs]).median


def _legend() -> Markup:
    elements, x = [], LEFT
    for name, text in PARTS.items():
        elements.append(h("rect", class_=name, x=x, y=20, width=14, height=14, rx=2))
        elements.append(h("text", text, class_="soft", x=x + 20, y=32))
        x += 44 + 7 * len(text)
    return join(elements)


def _axis(scale: Scale, height: int) -> Markup:
    elements = []
    for value in scale.ticks(6):
        x = LEFT + PLOT * scale(value)
        elements.append(h("line", class_="grid", x1=x, x2=x, y1=TOP - 12, y2=height - 34))
        elements.append(h("text", f"{value:g} s", class_="soft", x=x, y=height - 16, text_anchor="middle"))
    return join(elements)


def _row(name: str, label: str, spans: Sequence[Part], top: int, scale: Scale) -> Markup:
    weight = 600 if name.startswith(OURS) else None
    bars = [
        h("rect", h("title", f"{PARTS.get(part.name, part.name)}: {part.end - part.begin:.1f} s"), class_=part.name,
          x=LEFT + PLOT * scale(part.begin), y=top, width=PLOT * (part.end - part.begin) / scale.high, height=BAR)
        for part in spans
    ]  # fmt: skip
    return join(
        h("text", name, class_="ink", x=LEFT - 10, y=top + 15, text_anchor="end", font_weight=weight),
        bars,
        h("text", label, class_="ink", x=LEFT + PLOT + 10, y=top + 15, font_weight=weight),
    )
