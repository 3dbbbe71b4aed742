"""The charts of a run: loss, accuracy, learning rate and throughput over steps, on suitable axes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from distil_tl.report import text
from distil_tl.report.load import Metric, Run
from distil_tl.report.markup import Markup
from distil_tl.report.svg import (
    Chart,
    Mark,
    Point,
    Scale,
    Series,
    bucket_means,
    downsample,
    fit_scale,
    line_chart,
)

DENSE = 300  # logging intervals; with more, a smoothed curve is drawn over the raw one
MEANS = 120  # points of the smoothed curve


def _points(lines: Sequence[Metric], key: str) -> tuple[list[Point], int]:
    """The finite values of `key` over steps, and the number of lines without one."""
    value = attrgetter(key)
    points = [(float(m.step), value(m)) for m in lines if value(m) is not None]
    return points, len(lines) - len(points)


def _non_finite(count: int) -> str:
    return f"{count:,} non-finite value{'s' if count > 1 else ''} not drawn" if count else ""


def _raw_and_mean(points: list[Point], style: str, name: str) -> list[Series]:
    """The raw curve, and if it has many points also its mean over groups of intervals, as noise hides the trend."""
    if len(points) <= DENSE:
        return [Series(name, points, style)]
    means = bucket_means(points, MEANS)
    each = round(len(points) / MEANS)
    return [
        Series(name, downsample(points), style, faint=True),
        Series(f"{name}, mean of {each:,} intervals", means, style),
    ]


def _values(series: Sequence[Series]) -> list[float]:
    return [y for s in series for _, y in s.points]


def _describe(name: str, points: Sequence[Point], show: text.Format) -> str:
    """A sentence about the curve for screen readers."""
    if not points:
        return f"No {name} values."
    ys = [y for _, y in points]
    return (
        f"{name[:1].upper()}{name[1:]} from {show(ys[0])} to {show(ys[-1])} over {len(ys):,} values "
        f"(lowest {show(min(ys))}, highest {show(max(ys))})."
    )


def loss_chart(run: Run) -> Markup:
    """Training loss of each logging interval, validation loss of each evaluation."""
    train, bad_train = _points(run.lines("train", "interval") or run.lines("train", "epoch"), "loss")
    val, bad_val = _points(run.lines("val"), "loss")
    series = [*_raw_and_mean(train, "c-train", "train"), Series("val", downsample(val), "c-val", dots=True)]
    scale = fit_scale(_values(series), from_zero=True)
    notes = ["log scale" if scale.log else "", _non_finite(bad_train + bad_val)]
    return line_chart(
        Chart(
            title="Loss",
            describe=f"{_describe('train loss', train, text.decimal)} {_describe('val loss', val, text.decimal)}",
            series=series,
            bands=run.bands,
            scale=scale,
            note=" \u00b7 ".join(n for n in notes if n),
        )
    )


def accuracy_chart(run: Run) -> Markup:
    """Top-1 of training epochs and of evaluations, with a circle at the best, and macro-F1 of evaluations."""
    train, bad_train = _points(run.lines("train", "epoch") or run.lines("train", "interval"), "top1")
    val, bad_val = _points(run.lines("val"), "top1")
    series = [
        Series("train", downsample(train), "c-train", dots=len(train) < 60),
        Series("val", downsample(val), "c-val", dots=True),
        Series("val macro F1", downsample(_points(run.lines("val"), "macro_f1")[0]), "c-plain", dots=True),
    ]
    series = [curve for curve in series if curve.points or curve.name != "val macro F1"]
    values = _values(series) or [0.0]
    margin = max(max(values) - min(values), 0.02) * 0.08
    best = run.best
    mark = None
    if best and best.top1 is not None and best.step is not None:
        mark = Mark(best.step, best.top1, f"best {text.percent(best.top1)}")
    return line_chart(
        Chart(
            title="Top-1 accuracy and macro F1",
            describe=f"{_describe('train top-1', train, text.percent)} {_describe('val top-1', val, text.percent)}",
            series=series,
            bands=run.bands,
            scale=Scale(max(0.0, min(values) - margin), max(values) + margin),
            label=lambda v: f"{v * 100:.4g}{text.SPACE}%",
            percent=True,
            mark=mark if val else None,
            note=_non_finite(bad_train + bad_val),
        )
    )


def lr_chart(run: Run) -> Markup:
    """The learning rate, one curve for each stage."""
    lines = run.lines("train", "interval") or run.lines("train", "epoch")
    points, _ = _points(lines, "lr")
    peaks: dict[str, float] = {}
    for m in lines:
        peaks[m.stage] = max(peaks.get(m.stage, 0.0), m.lr or 0.0)
    positive = [peak for peak in peaks.values() if peak > 0]
    if positive and max(positive) / min(positive) >= 20:
        # A linear axis would flatten the stage with the smallest rates. A decay to zero is cut at a hundredth of it.
        scale = Scale(min(positive) / 100, max(positive) * 1.3, log=True)
    else:
        scale = Scale(0.0, max(positive, default=0.9) * 1.1)
    return line_chart(
        Chart(
            title="Learning rate",
            describe=_describe("learning rate", points, text.tick),
            series=[Series("learning rate", downsample(points), "c-plain", broken=True)],
            bands=run.bands,
            scale=scale,
            note="log scale" if scale.log else "",
            low=True,
        )
    )


def throughput_chart(run: Run) -> Markup:
    """Training images per second, all ranks together."""
    points, _ = _points(run.lines("train", "interval") or run.lines("train", "epoch"), "images_per_second")
    series = _raw_and_mean(points, "c-plain", "train images/s")
    scale = fit_scale(_values(series), from_zero=True)
    return line_chart(
        Chart(
            title="Training images per second",
            describe=_describe("throughput", points, text.rate),
            series=series,
            bands=run.bands,
            scale=scale,
            note="log scale" if scale.log else "",
            low=True,
        )
    )
