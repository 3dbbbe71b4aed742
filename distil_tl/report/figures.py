"""What the figures of a run are compared with, its settings, and how intervals are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from distil_tl.data.augmentation import augment_text
from distil_tl.report.load import Metric, Run, mapping
from distil_tl.report.text import number, percent
from distil_tl.utils.intervals import Interval


def between(interval: Interval | None) -> str:
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


def _augmentation(stages: dict[str, Any], general: Any) -> str | None:
    """That of all stages, or of each by name if they differ."""
    own = {name: stage.get("augment") or general for name, stage in stages.items() if stage.get("epochs") != 0}
    texts = {name: augment_text(augment) for name, augment in own.items() if augment}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{name} {text}" for name, text in texts.items()) or None


def settings(run: Run) -> list[tuple[str, str]]:
    """The settings that matter most, by name."""
    config = run.settings
    data, model, optim = (mapping(config, key) for key in ("data", "model", "optim"))
    resolved = mapping(run.summary, "resolved")
    crop, augment = (resolved.get(f"data.{key}", data.get(key)) for key in ("crop_mode", "augment"))
    shown = [
        ("Model", model.get("name")),
        ("Weights", str(model.get("weights", "")).rpartition("/")[2]),
        ("Images", _images(run)),
        ("Size", f"{data['image_size']} px" if data.get("image_size") else None),
        ("Crop", crop if crop != "weights" else None),
        ("Kept of the sides", data.get("crop_pct")),
        ("Batch", resolved.get("data.global_batch_size", data.get("global_batch_size"))),
        ("Augmentation", _augmentation(mapping(config, "stages"), augment)),
        ("Balance", data.get("balance") if data.get("balance") != "none" else None),
        ("Optimizer", optim.get("name")),
        ("Weight decay", optim.get("weight_decay")),
        ("Metric", config.get("metric") if config.get("metric") != "top1" else None),
        ("Seed", config.get("seed")),
    ]
    return [(name, str(value)) for name, value in shown if value not in (None, "")] if config else []
