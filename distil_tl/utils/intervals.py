"""95 % confidence intervals of figures that count images, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Z = 1.959964  # of a normal distribution: 95 % lie within
DRAWS = 1000  # of the bootstrap
MAX_CELLS = 20_000  # of a confusion matrix that are not 0; with more, drawing takes long
MAX_CLASSES = 1000

Interval = tuple[float, float]


def wilson(correct: float, n: float) -> Interval | None:
    """The interval of Wilson (1927) for a share of `correct` in `n`; None for n = 0."""
    if n <= 0 or not 0 <= correct <= n:
        return None
    share, extra = correct / n, Z**2 / n
    middle = (share + extra / 2) / (1 + extra)
    half = Z * math.sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(rows: Sequence[Sequence[float]]) -> dict[str, Interval]:
    """Percentile intervals of macro_f1 and balanced_accuracy: the images of a confusion matrix are drawn repeatedly.

    Empty without images, or with too many classes. Where all images are right, or none is, each draw is the same: then
    as `_of_equal_draws`.
    """
    import numpy as np  # not needed for a report without an evaluation

    matrix = np.array(rows, dtype=np.float64)
    cells, n = np.flatnonzero(matrix), matrix.sum()
    if n <= 0 or len(cells) > MAX_CELLS or len(matrix) > MAX_CLASSES:
        return {}
    if (correct := float(np.trace(matrix))) in (0.0, n):
        return dict.fromkeys(("macro_f1", "balanced_accuracy"), _of_equal_draws(correct > 0, matrix.sum(axis=1)))
    drawn = np.random.default_rng(0).multinomial(int(n), matrix.flat[cells] / n, size=DRAWS).astype(np.float64)
    target, predicted = np.divmod(cells, len(matrix))
    hits, targets, predictions = np.zeros((3, len(matrix), DRAWS))
    for column, i, j in zip(drawn.T, target, predicted, strict=True):
        hits[i] += column * (i == j)
        targets[i] += column
        predictions[j] += column
    found = {}
    for name, right, counted in (
        ("macro_f1", 2 * hits, targets + predictions),
        ("balanced_accuracy", hits, targets),
    ):
        with np.errstate(invalid="ignore"):
            scores = np.nanmean(np.where(counted > 0, right / counted, np.nan), axis=0)
        low, high = np.quantile(scores, [0.025, 0.975])
        found[name] = (float(low), float(high))
    return found


def _of_equal_draws(all_right: bool, images: Sequence[float]) -> Interval:
    """The interval of a mean over classes whose images are all right, or all wrong.

    Its width is that of top-1, or of the mean if the smallest class alone is at the end of its interval, whichever is
    larger.

    Args:
        images: of each class.
    """
    counted = [n for n in images if n > 0]
    of_all, of_smallest = (wilson(0, n) or (0.0, 1.0) for n in (sum(counted), min(counted)))
    width = float(max(of_all[1], of_smallest[1] / len(counted)))
    return (1.0 - width, 1.0) if all_right else (0.0, width)


def of_counts(figures: Mapping[str, Any]) -> dict[str, Interval]:
    """Wilson's intervals of `top1` and `top5`, where these and `n`, the number of images, are known."""
    n, found = _number(figures.get("n")), dict[str, Interval]()
    for name in ("top1", "top5"):
        share = _number(figures.get(name))
        if n is not None and share is not None and (interval := wilson(share * n, n)) is not None:
            found[name] = interval
    return found


def of_evaluation(content: Mapping[str, Any]) -> dict[str, Interval]:
    """The intervals of the figures in evaluation.json. Of five classes or fewer, top-5 is 1 for any images."""
    matrix, found = content.get("confusion_matrix"), of_counts(content)
    if len(content["classes"]) <= 5:
        found.pop("top5", None)
    return {**found, **(bootstrap(matrix) if matrix else {})}


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def plus_minus(value: float, interval: Sequence[float] | None) -> str:
    """`0.8120 ± 0.0243`: a figure, and half the width of its interval, which may be longer on one side."""
    return f"{value:.4f}" if interval is None else f"{value:.4f} \u00b1 {(interval[1] - interval[0]) / 2:.4f}"
