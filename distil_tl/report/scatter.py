"""Points in a plane as inline SVG whose text keeps its size at any width, as in `svg.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distil_tl.report.markup import Markup, h
from distil_tl.report.svg import UNITS, Scale
from distil_tl.report.text import tick


@dataclass(frozen=True)
class Dot:
    """A point. `title` is shown at the pointer, `style` is its CSS class."""

    x: float
    y: float
    title: str
    style: str
    ring: bool = False


@dataclass(frozen=True)
class Plane:
    """Points, a line through some of them, and a band in which the y are about equal.

    Attributes:
        describe: text for screen readers.
        line: the points of the line, by x.
        band: lowest and highest y.
        legend: (CSS class, name) of each kind of points.
    """

    title: str
    describe: str
    dots: Sequence[Dot]
    x: Scale
    y: Scale
    x_name: str
    label: Callable[[float], str]
    line: Sequence[tuple[float, float]] = ()
    band: tuple[float, float] | None = None
    legend: Sequence[tuple[str, str]] = field(default_factory=tuple)


def scatter(plane: Plane) -> Markup:
    """The figure with title, legend, axes and points."""
    picture = h(
        "svg",
        h("title", plane.title),
        h("desc", plane.describe),
        _band(plane),
        _axes(plane),
        _line(plane),
        [part for dot in plane.dots for part in _dot(dot, plane)],
        role="img",
        width="100%",
        height="100%",
    )
    legend = [h("span", h("i", class_=f"key {style}"), name) for style, name in plane.legend]
    return h(
        "figure",
        h("figcaption", h("h3", plane.title), h("div", legend, class_="legend")),
        h("div", picture, class_="plot tall"),
        h("div", plane.x_name, class_="xlabel", aria_hidden="true"),
    )


def _percent(fraction: float) -> str:
    return f"{min(max(fraction, 0.0), 1.0) * 100:.4g}%"


def _band(plane: Plane) -> Markup | None:
    if plane.band is None:
        return None
    low, high = (min(max(plane.y(value), 0.0), 1.0) for value in plane.band)
    return h("rect", class_="band odd", x="0", y=_percent(1 - high), width="100%", height=_percent(high - low))


def _axes(plane: Plane) -> list[Markup]:
    parts = []
    for value in plane.y.ticks(5):
        top = _percent(1 - plane.y(value))
        parts.append(h("line", class_="grid", x1="0", x2="100%", y1=top, y2=top))
        parts.append(h("text", plane.label(value), class_="tick y", x="-8", y=top, dy="4"))
    parts.append(h("line", class_="axis", x1="0", x2="100%", y1="100%", y2="100%"))
    for value in plane.x.ticks(4):
        parts.append(h("text", tick(value), class_="tick x", x=_percent(plane.x(value)), y="100%", dy="18"))
    return parts


def _line(plane: Plane) -> Markup | None:
    if len(plane.line) < 2:
        return None
    at = [(round(plane.x(x) * UNITS), round((1 - plane.y(y)) * UNITS)) for x, y in plane.line]
    path = "".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(at))
    curve = h("path", class_="curve c-val", d=path, vector_effect="non-scaling-stroke")
    return h("svg", curve, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none", width="100%", height="100%")


def _dot(dot: Dot, plane: Plane) -> list[Markup]:
    left, top = _percent(plane.x(dot.x)), _percent(1 - plane.y(dot.y))
    point = h("circle", h("title", dot.title), class_=f"point {dot.style}", cx=left, cy=top, r="5")
    return [h("circle", class_="ring", cx=left, cy=top, r="9"), point] if dot.ring else [point]
