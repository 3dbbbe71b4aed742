"""Calibration: its figures on val and test, and reliability diagrams."""

from __future__ import annotations

from typing import Any

from distil_tl.report import text
from distil_tl.report.load import Run, mapping
from distil_tl.report.markup import Child, Markup, h
from distil_tl.report.svg import UNITS, Point
from distil_tl.report.tables import table
from distil_tl.report.text import number

NAMES = {"raw": "as trained", "calibrated": "with temperature"}
STYLES = {"raw": "c-train", "calibrated": "c-val"}
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def calibration(run: Run) -> list[Child] | None:
    """The temperature, a table of figures, and a diagram for each split; None if nothing was counted."""
    splits = {"val": run.evaluation, "test": run.test}
    found = {split: mapping(evaluation, "calibration") for split, evaluation in splits.items()}
    known = {split: each for split, each in found.items() if number(mapping(each, "raw").get("ece")) is not None}
    if not known:
        return None
    rows: list[list[Child]] = []
    for split, each in known.items():
        for name, shown in NAMES.items():
            figures = mapping(each, name)
            if number(figures.get("ece")) is not None:
                values = [text.percent(number(figures["ece"]))]
                values += [text.decimal(number(figures.get(key)), 4) for key in ("nll", "brier")]
                rows.append([f"{split}, {shown}", text.count(number(figures.get("n"))), *values])
    head = ["", "Images", "ECE", "NLL", "Brier score"]
    diagrams = [_diagram(split, each) for split, each in known.items()]
    return [
        h("p", _sentence(mapping(run.evaluation, "calibration"))),
        table(head, rows, label="Calibration"),
        h("div", diagrams, class_="pair diagrams"),
    ]


def _sentence(on_val: dict[str, Any]) -> str:
    temperature, reason = number(on_val.get("temperature")), on_val.get("reason")
    if temperature is None:
        return f"No temperature: {reason}." if isinstance(reason, str) else "No temperature was fitted."
    kind = "over" if temperature > 1 else "under"
    return (
        f"Temperature {temperature:.3g}, fitted on val: the logits are divided by it before softmax, because the "
        f"network is {kind}confident. The predicted classes do not change."
    )


def _points(figures: dict[str, Any]) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """Of each bin with images: its confidence and accuracy; and its edges and number of images."""
    points, sizes = [], []
    bins = figures.get("bins")
    for row in bins if isinstance(bins, list) else []:
        keys = ("confidence", "accuracy", "low", "high")
        shares = [number(row.get(key)) if isinstance(row, dict) else None for key in keys]
        x, y, low, high = (None if share is None else min(max(share, 0.0), 1.0) for share in shares)
        if x is not None and y is not None and low is not None and high is not None:
            points.append((x, y))
            sizes.append((low, high, number(row.get("n")) or 0.0))
    return points, sizes


def _diagram(split: str, found: dict[str, Any]) -> Markup:
    """Accuracy over confidence, with the diagonal of perfect calibration, and bars for the share of images."""
    curves, legend, sizes = [], [], list[tuple[float, float, float]]()
    for name, shown in NAMES.items():
        points, own = _points(mapping(found, name))
        if points:
            sizes = own
            places = [(round(x * UNITS), round((1 - y) * UNITS)) for x, y in points]
            path = "M" + "L".join(f"{x} {y}" for x, y in places)
            dots = "".join(f"M{x} {y}h0" for x, y in places)
            for style, line in (("curve", path), ("dots", dots)):
                curves.append(h("path", class_=f"{style} {STYLES[name]}", d=line, vector_effect="non-scaling-stroke"))
            legend.append(h("span", h("i", class_=f"key {STYLES[name]}"), shown))
    total = sum(n for _, _, n in sizes) or 1.0
    bars = []
    for low, high, n in sizes:
        title = f"{text.count(n)} images with a confidence of {text.percent(low)} to {text.percent(high)}"
        place = {"x": _at(low), "width": _at(max(0.0, high - low)), "y": _at(1 - n / total), "height": _at(n / total)}
        bars.append(h("rect", h("title", title), class_="band odd", **place))
    axes = [h("line", class_="edge", x1="0", y1="100%", x2="100%", y2="0")]
    for value in TICKS:
        axes.append(h("line", class_="grid", x1="0", x2="100%", y1=_at(1 - value), y2=_at(1 - value)))
        axes.append(h("text", text.percent(value, 0), class_="tick y", x="-8", y=_at(1 - value), dy="4"))
        axes.append(h("text", text.percent(value, 0), class_="tick x", x=_at(value), y="100%", dy="18"))
    inner = h("svg", curves, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none", width="100%", height="100%")
    describe = f"Accuracy of predictions over their confidence on {split}, in bins; perfect is the diagonal."
    picture = h(
        "svg", h("title", f"Reliability on {split}"), h("desc", describe), bars, axes, inner,
        role="img", width="100%", height="100%",
    )  # fmt: skip
    note = h("span", "bars: share of the images", class_="note")
    return h(
        "figure",
        h("figcaption", h("h3", f"Accuracy by confidence, {split}"), h("div", legend, note, class_="legend")),
        h("div", picture, class_="plot"),
        h("div", "confidence", class_="xlabel", aria_hidden="true"),
    )


def _at(fraction: float) -> str:
    return f"{fraction * 100:.4g}%"
