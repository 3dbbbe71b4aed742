"""Line charts as inline SVG that keep their text size at any width.

Everything is placed in per cent of the plot and only the curves live in a stretched inner `svg`
(with strokes that do not scale), so one drawing serves a phone, a wide screen and paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distil_tl.report.load import Band
from distil_tl.report.markup import Markup, h
from distil_tl.report.text import tick

Point = tuple[float, float]
MAX_POINTS = 600
UNITS = 10_000  # of the inner svg, both ways: integer coordinates are fine enough and short


@dataclass(frozen=True)
class Series:
    """A curve. `style` is its CSS class; `broken` curves start anew in every stage."""

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False
    broken: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Scale:
    """Values to fractions of the axis, 0 at `low`."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            start, end = math.log(self.low), math.log(self.high)
            return (math.log(max(value, self.low)) - start) / (end - start)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> list[float]:
        """Round values inside the axis, some `about` of them."""
        if not self.log:
            return linear_ticks(self.low, self.high, about)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            found = [t for t in found if self.low * 0.999 <= t <= self.high * 1.001]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / (about + 2))]
        return linear_ticks(self.low, self.high, about)


@dataclass(frozen=True)
class Mark:
    """A point with a word at it."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A figure: its curves over steps, on the stage bands."""

    title: str
    describe: str
    series: Sequence[Series]
    bands: Sequence[Band]
    scale: Scale
    label: Callable[[float], str] = tick
    percent: bool = False
    mark: Mark | None = None
    note: str = ""
    low: bool = False


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    raw = (high - low) / max(about, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(f * size for f in (1, 2, 5, 10) if f * size >= raw * 0.75)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [i * step for i in range(first, last + 1)]


def fit_scale(values: Sequence[float], *, from_zero: bool = False, log_from: float = 30.0) -> Scale:
    """An axis around `values`; logarithmic where they span more than a factor of `log_from`."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low > log_from:
        # Nobody reads more than eight decades; what is below them lies on the axis.
        return Scale(max(low * 0.8, high * 1e-8), high * 1.25, log=True)
    if from_zero and low >= 0:
        return Scale(0.0, high * 1.08 or 1.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    return Scale(low if low == 0 else low - room, high + room)


def downsample(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: first, last, and the lowest and highest of every bucket between."""
    if len(points) <= limit:
        return list(points)
    buckets = max(1, (limit - 2) // 2)
    inner = len(points) - 2
    kept = [points[0]]
    for b in range(buckets):
        bucket = range(1 + b * inner // buckets, 1 + (b + 1) * inner // buckets)
        ends = {min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return [*kept, points[-1]]


def bucket_means(points: Sequence[Point], buckets: int) -> list[Point]:
    """The mean point of every one of `buckets` equal runs of points."""
    means = []
    for b in range(buckets):
        part = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return means


def _curve(series: Series, x: Scale, y: Scale, edges: Sequence[int]) -> list[Markup]:
    places = [(round(x(px) * UNITS), round((1 - y(py)) * UNITS)) for px, py in series.points]
    path, stage = [], -1
    for (px, _), (cx, cy) in zip(series.points, places, strict=True):
        now = sum(px > edge for edge in edges) if series.broken else 0
        path.append(f"{'L' if now == stage else 'M'}{cx} {cy}")
        stage = now
    style = f"curve {series.style}" + (" faint" if series.faint else "")
    parts = [h("path", class_=style, d="".join(path), vector_effect="non-scaling-stroke")]
    if (series.dots and len(places) <= 80) or len(places) == 1:
        # A line of no length with round caps stays a circle however the svg is stretched.
        dots = "".join(f"M{cx} {cy}h0" for cx, cy in places)
        parts.append(h("path", class_=f"dots {series.style}", d=dots, vector_effect="non-scaling-stroke"))
    return parts


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.4g}%"


def _axes(chart: Chart, x: Scale) -> list[Markup]:
    parts = []
    for i, band in enumerate(chart.bands):
        left, width = _percent(x(band.start)), _percent(x(band.end) - x(band.start))
        shade = "band odd" if i % 2 else "band"
        parts.append(h("rect", class_=shade, x=left, y="0", width=width, height="100%"))
        if i:
            parts.append(h("line", class_="edge", x1=left, x2=left, y1="0", y2="100%"))
    for value in chart.scale.ticks(3 if chart.low else 5):
        place = _percent(1 - chart.scale(value))
        parts.append(h("line", class_="grid", x1="0", x2="100%", y1=place, y2=place))
        parts.append(h("text", chart.label(value), class_="tick y", x="-8", y=place, dy="4"))
    parts.append(h("line", class_="axis", x1="0", x2="100%", y1="100%", y2="100%"))
    for value in x.ticks(4):
        if value == int(value):
            place = _percent(x(value))
            parts.append(
                h(
                    "text",
                    tick(value) if value >= 10_000 else f"{value:,.0f}",
                    class_="tick x",
                    x=place,
                    y="100%",
                    dy="18",
                )
            )
    return parts


def _mark(mark: Mark, x: Scale, y: Scale) -> list[Markup]:
    fx, fy = x(mark.x), y(mark.y)
    anchor = "end" if fx > 0.8 else "start" if fx < 0.2 else "middle"
    place = {"x": _percent(fx), "y": _percent(1 - fy)}
    return [
        h("circle", class_="ring", cx=place["x"], cy=place["y"], r="6"),
        h("text", mark.label, class_="best", dy="28" if fy > 0.5 else "-15", text_anchor=anchor, **place),
    ]


def _strip(chart: Chart, x: Scale) -> Markup:
    """The stage names above the plot: HTML, because SVG text cannot end in an ellipsis."""
    names = []
    for i, band in enumerate(chart.bands):
        left, width = x(band.start), x(band.end) - x(band.start)
        title = f"stage {band.name}: steps {band.start:,} to {band.end:,}"
        style = f"left:{_percent(left)};width:{_percent(width)}"
        names.append(h("span", band.name, class_="odd" if i % 2 else None, style=style, title=title))
    return h("div", names, class_="strip", aria_hidden="true")


def _readout(chart: Chart, x: Scale) -> str:
    """What the hover script needs, as JSON."""
    shown = [s for s in chart.series if not s.faint]
    return json.dumps(
        {
            "x": x.high,
            "y": [chart.scale.low, chart.scale.high, int(chart.scale.log)],
            "percent": chart.percent,
            "bands": [[b.name, b.end] for b in chart.bands],
            "series": [
                [
                    s.name,
                    s.style,
                    [round(px) for px, _ in s.points],
                    [float(f"{py:.4g}") for _, py in s.points],
                ]
                for s in shown
            ],
        },
        separators=(",", ":"),
    )


def line_chart(chart: Chart) -> Markup:
    """The figure with title, legend, stage names and curves; a sentence when there is no data."""
    heading = h("h3", chart.title)
    series = [s for s in chart.series if s.points]
    if not series:
        return h("figure", h("figcaption", heading), h("p", "Nothing recorded yet.", class_="empty"))
    x = Scale(0.0, float(max([b.end for b in chart.bands] + [round(s.points[-1][0]) for s in series])) or 1.0)
    edges = [b.end for b in chart.bands[:-1]]
    curves = [part for s in series for part in _curve(s, x, chart.scale, edges)]
    inner = h("svg", curves, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none", width="100%", height="100%")
    mark = _mark(chart.mark, x, chart.scale) if chart.mark else []
    picture = h(
        "svg",
        h("title", chart.title),
        h("desc", chart.describe),
        _axes(chart, x),
        inner,
        mark,
        role="img",
        width="100%",
        height="100%",
    )
    named = [s for s in series if not s.faint]
    legend = [h("span", h("i", class_=f"key {s.style}"), s.name) for s in named]
    note = h("span", chart.note, class_="note") if chart.note else None
    return h(
        "figure",
        h("figcaption", heading, h("div", legend, note, class_="legend")),
        _strip(chart, x),
        h("div", picture, class_="plot low" if chart.low else "plot", data_chart=_readout(chart, x)),
        h("div", "step", class_="xlabel", aria_hidden="true"),
    )
