"""Line charts as inline SVG whose text keeps its size at any width.

Positions are percentages of the plot. Only the curves are in an inner `svg` that is stretched, with strokes that do
not scale. So one drawing fits a phone, a wide screen and paper.
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
UNITS = 10_000  # width and height of the inner svg, so that integer coordinates are precise enough


@dataclass(frozen=True)
class Series:
    """A curve. `style` is its CSS class. A `broken` curve has gaps between stages; a `faint` one has no legend."""

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False
    broken: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Scale:
    """An axis: maps a value to a fraction of its length, 0 at `low` and 1 at `high`."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            start, end = math.log(self.low), math.log(self.high)
            return (math.log(max(value, self.low)) - start) / (end - start)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> list[float]:
        """Round values on the axis, approximately `about` of them."""
        if not self.log:
            return linear_ticks(self.low, self.high, about)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 3), (1, 2, 5)):
            ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            ticks = [t for t in ticks if self.low * 0.999 <= t <= self.high * 1.001]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / (about + 2))]
        return linear_ticks(self.low, self.high, about)


@dataclass(frozen=True)
class Mark:
    """A labelled point."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Curves over steps, with the stages as bands behind them.

    `describe` is text for screen readers. `low` makes a chart of half the height.
    """

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
    """An axis around `values`; logarithmic if they span more than a factor of `log_from`."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low > log_from:
        # At most eight decades; smaller values are drawn at the lower end.
        return Scale(max(low * 0.8, high * 1e-8), high * 1.25, log=True)
    if from_zero and low >= 0:
        return Scale(0.0, high * 1.08 or 1.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    return Scale(low if low == 0 else low - margin, high + margin)


def downsample(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: the first, the last, and the lowest and highest of each bucket between them."""
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
    """The mean point of each of `buckets` groups of consecutive points, equal in size."""
    means = []
    for b in range(buckets):
        part = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return means


def _curve(series: Series, x: Scale, y: Scale, edges: Sequence[int]) -> list[Markup]:
    coordinates = [(round(x(px) * UNITS), round((1 - y(py)) * UNITS)) for px, py in series.points]
    path, previous = [], -1
    for (px, _), (cx, cy) in zip(series.points, coordinates, strict=True):
        stage = sum(px > edge for edge in edges) if series.broken else 0
        path.append(f"{'L' if stage == previous else 'M'}{cx} {cy}")
        previous = stage
    style = f"curve {series.style}" + (" faint" if series.faint else "")
    parts = [h("path", class_=style, d="".join(path), vector_effect="non-scaling-stroke")]
    if (series.dots and len(coordinates) <= 80) or len(coordinates) == 1:
        # A line of length zero with round caps stays a circle when the svg is stretched.
        dots = "".join(f"M{cx} {cy}h0" for cx, cy in coordinates)
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
        height = _percent(1 - chart.scale(value))
        parts.append(h("line", class_="grid", x1="0", x2="100%", y1=height, y2=height))
        parts.append(h("text", chart.label(value), class_="tick y", x="-8", y=height, dy="4"))
    parts.append(h("line", class_="axis", x1="0", x2="100%", y1="100%", y2="100%"))
    for value in x.ticks(4):
        if value == int(value):
            label = tick(value) if value >= 10_000 else f"{value:,.0f}"
            parts.append(h("text", label, class_="tick x", x=_percent(x(value)), y="100%", dy="18"))
    return parts


def _mark(mark: Mark, x: Scale, y: Scale) -> list[Markup]:
    fx, fy = x(mark.x), y(mark.y)
    anchor = "end" if fx > 0.8 else "start" if fx < 0.2 else "middle"
    left, top = _percent(fx), _percent(1 - fy)
    return [
        h("circle", class_="ring", cx=left, cy=top, r="6"),
        h("text", mark.label, class_="best", dy="28" if fy > 0.5 else "-15", text_anchor=anchor, x=left, y=top),
    ]


def _strip(chart: Chart, x: Scale) -> Markup:
    """The stage names above the plot. In HTML, because SVG text can't be shortened with an ellipsis."""
    names = []
    for i, band in enumerate(chart.bands):
        left, width = x(band.start), x(band.end) - x(band.start)
        title = f"stage {band.name}: steps {band.start:,} to {band.end:,}"
        style = f"left:{_percent(left)};width:{_percent(width)}"
        names.append(h("span", band.name, class_="odd" if i % 2 else None, style=style, title=title))
    return h("div", names, class_="strip", aria_hidden="true")


def _readout(chart: Chart, x: Scale) -> str:
    """The data for hover.js, as JSON."""
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
    """The figure with title, legend, stage names and curves, or a note that there is no data."""
    heading = h("h3", chart.title)
    series = [s for s in chart.series if s.points]
    if not series:
        return h("figure", h("figcaption", heading), h("p", "No data yet.", class_="empty"))
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
    legend = [h("span", h("i", class_=f"key {s.style}"), s.name) for s in series if not s.faint]
    note = h("span", chart.note, class_="note") if chart.note else None
    return h(
        "figure",
        h("figcaption", heading, h("div", legend, note, class_="legend")),
        _strip(chart, x),
        h("div", picture, class_="plot low" if chart.low else "plot", data_chart=_readout(chart, x)),
        h("div", "step", class_="xlabel", aria_hidden="true"),
    )
