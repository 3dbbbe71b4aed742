"""How sure the figures of a run are, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_tl.data.augmentation import augment_text
from distil_tl.report.load import Metric, Run, mapping
from distil_tl.report.text import number, percent

Z = 1.959964  # of a normal distribution: 95 % lie within
DRAWS = 1000  # of the bootstrap
MAX_CELLS = 20_000  # of a confusion matrix that are not 0; with more, drawing takes long
MAX_CLASSES = 1000


def wilson(correct: float, n: float) -> tuple[float, float] | None:
    """The 95 % interval of Wilson (1927) for a share of `correct` in `n`; None for n = 0."""
    if n <= 0 or not 0 <= correct <= n:
        return None
    share, extra = correct / n, Z**2 / n
    middle = (share + extra / 2) / (1 + extra)
    half = Z * math.sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrapped_f1(rows: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % percentile interval of macro-F1, by drawing the images of a confusion matrix again and again.

    None without images, or with too many classes.
    """
    import numpy as np  # not needed for a report without an evaluation

    matrix = np.array(rows, dtype=np.float64)
    cells, n = np.flatnonzero(matrix), matrix.sum()
    if n <= 0 or len(cells) > MAX_CELLS or len(matrix) > MAX_CLASSES:
        return None
    drawn = np.random.default_rng(0).multinomial(int(n), matrix.flat[cells] / n, size=DRAWS).astype(np.float64)
    target, predicted = np.divmod(cells, len(matrix))
    by_class = np.zeros((3, len(matrix), DRAWS))  # hits, targets and predictions
    for column, i, j in zip(drawn.T, target, predicted, strict=True):
        by_class[0, i] += column * (i == j)
        by_class[1, i] += column
        by_class[2, j] += column
    counted = by_class[1] + by_class[2]
    with np.errstate(invalid="ignore"):
        scores = np.nanmean(np.where(counted > 0, 2 * by_class[0] / counted, np.nan), axis=0)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def between(interval: tuple[float, float] | None) -> str:
    """An interval as text; empty if there is none."""
    return "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def baseline(evaluation: dict[str, Any]) -> tuple[str, float] | None:
    """The largest class of an evaluation, and the accuracy of always predicting it."""
    rows = evaluation.get("per_class")
    sizes = [
        (number(row.get("n")) or 0.0, str(row.get("class")))
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]
    total = sum(n for n, _ in sizes)
    if not total:
        return None
    n, name = max(sizes, key=lambda pair: pair[0])
    return name, n / total


def overfitting(run: Run) -> tuple[int, str] | None:
    """If the loss on val rose in the last stage while that on train fell: the epoch of the lowest, and a sentence."""
    if not run.bands:
        return None
    stage = run.bands[-1].name
    val = [m for m in run.lines("val") if m.stage == stage and m.loss is not None]
    train = {m.epoch: m.loss for m in run.lines("train", "epoch") if m.stage == stage and m.loss is not None}
    if len(val) < 3:
        return None
    lowest = min(val, key=_loss)
    last, rise = val[-1], _loss(val[-1]) / max(_loss(lowest), 1e-9)
    before, after = train.get(lowest.epoch), train.get(last.epoch)
    if rise < 1.05 or before is None or after is None or after >= before:
        return None
    return lowest.epoch or 1, (
        f"Overfitting: since epoch {lowest.epoch} of stage {stage} the loss on val has risen from "
        f"{_loss(lowest):.3f} to {_loss(last):.3f}, while that on train fell from {before:.3f} to {after:.3f}. Fewer "
        "epochs, stronger augmentation or more weight decay may help."
    )


def _loss(metric: Metric) -> float:
    return math.inf if metric.loss is None else metric.loss


def _images(run: Run) -> str:
    """The names of the folder and of the table, without their paths."""
    data, saved = mapping(run.settings, "data"), Path(str(run.settings.get("run_dir") or run.name))
    if data.get("root") is None:
        return "digits"
    root = Path(str(data["root"]))
    place, depth = run.directory.resolve(), len(saved.parts)
    if root.name in ("", "..") and not saved.is_absolute() and place.parts[-depth:] == saved.parts:
        root = (place.parents[depth - 1] / root).resolve()  # relative to the folder that the run was started in
    table = Path(str(data["labels"])).name if data.get("labels") else ""
    return ", ".join(filter(None, (root.name, table)))


def settings(run: Run) -> list[tuple[str, str]]:
    """The settings that matter most, by name."""
    config = run.settings
    data, model, optim = (mapping(config, key) for key in ("data", "model", "optim"))
    shown = [
        ("Model", model.get("name")),
        ("Weights", str(model.get("weights", "")).rpartition("/")[2]),
        ("Images", _images(run)),
        ("Size", f"{data['image_size']} px" if data.get("image_size") else None),
        ("Crop", data.get("crop_mode") if data.get("crop_mode") != "weights" else None),
        ("Kept of the sides", data.get("crop_pct")),
        ("Batch", mapping(run.summary, "resolved").get("data.global_batch_size", data.get("global_batch_size"))),
        ("Augmentation", data.get("augment") and augment_text(data["augment"])),
        ("Balance", data.get("balance") if data.get("balance") != "none" else None),
        ("Optimizer", optim.get("name")),
        ("Weight decay", optim.get("weight_decay")),
        ("Metric", config.get("metric") if config.get("metric") != "top1" else None),
        ("Seed", config.get("seed")),
    ]
    return [(name, str(value)) for name, value in shown if value not in (None, "")] if config else []
