"""Reading a run directory. Only metrics.jsonl is required, and every file may be incomplete or damaged."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from distil_tl.report.text import number
from distil_tl.utils.errors import UserError


class Metric(NamedTuple):
    """A line of metrics.jsonl; `window` is empty for val lines."""

    step: int
    epoch: int
    stage: str
    split: str
    window: str
    loss: float | None
    top1: float | None
    top5: float | None
    macro_f1: float | None
    balanced_accuracy: float | None
    lr: float | None
    images_per_second: float | None
    samples_seen: float | None
    time: float | None
    seconds: float | None
    data_wait_seconds: float | None


class Band(NamedTuple):
    """The range of steps of one stage."""

    name: str
    start: int
    end: int


class Best(NamedTuple):
    """The best evaluation on val: from summary.json, or from metrics.jsonl while there is none."""

    top1: float | None
    macro_f1: float | None
    stage: str
    epoch: int | None
    step: int | None


@dataclass(frozen=True)
class Run:
    """The content of a run directory.

    Attributes:
        test: as `evaluation`, on test.
        train_counts: training images, by class.
        samples: by stage, a JPEG image with some training images as augmented.
        notes: problems to show on the page.
    """

    name: str
    directory: Path
    metrics: list[Metric]
    summary: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    train_counts: dict[str, int] = field(default_factory=dict)
    samples: dict[str, bytes] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    config: str | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as nested dicts; empty if there is none that can be read."""
        import yaml

        try:
            tree = yaml.safe_load(self.config or "")
        except yaml.YAMLError:
            return {}
        return tree if isinstance(tree, dict) else {}

    @property
    def intensity(self) -> Any:
        """`data.intensity` of the run, by which thumbnails are scaled as its images were."""
        return mapping(self.settings, "data").get("intensity", "dtype")

    @property
    def metric(self) -> str:
        """What chooses the best epoch."""
        saved = mapping(self.summary, "best").get("metric") or self.settings.get("metric")
        return str(saved) if saved in ("loss", "top5", "macro_f1", "balanced_accuracy") else "top1"

    def relative(self, path: str) -> str:
        """The path of an image without the folder of the images."""
        root = mapping(self.settings, "data").get("root")
        return path.removeprefix(f"{str(root).rstrip('/')}/") if root else path

    def lines(self, split: str, window: str = "") -> list[Metric]:
        """The lines of one split (and window), by step."""
        return [m for m in self.metrics if m.split == split and (not window or m.window == window)]

    @cached_property
    def bands(self) -> list[Band]:
        """The stages in order, as ranges of steps without gaps."""
        ends: dict[str, tuple[int, int]] = {}
        for m in self.metrics:
            first, last = ends.get(m.stage, (m.step, m.step))
            ends[m.stage] = min(first, m.step), max(last, m.step)
        bands: list[Band] = []
        for name, (_, last) in sorted(ends.items(), key=lambda item: item[1]):
            start = bands[-1].end if bands else 0
            bands.append(Band(name, start, max(start, last)))
        return bands

    @property
    def best(self) -> Best | None:
        """summary.json decides which validation was best; in a run without one, its metric does."""
        saved = mapping(self.summary, "best")
        if number(saved.get("top1")) is not None:
            return Best(
                number(saved.get("top1")),
                number(saved.get("macro_f1")),
                str(saved.get("stage") or ""),
                integer(saved.get("epoch")),
                integer(saved.get("step")),
            )
        scored = [(value, m) for m in self.lines("val") if (value := getattr(m, self.metric)) is not None]
        if not scored:
            return None
        sign = 1 if self.metric == "loss" else -1
        _, m = min(scored, key=lambda pair: (sign * pair[0], math.inf if pair[1].loss is None else pair[1].loss))
        return Best(m.top1, m.macro_f1, m.stage, m.epoch, m.step)


def mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    """`values[key]` if it is a mapping, else an empty one."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def integer(value: object) -> int | None:
    """A finite number as an int, None for anything else."""
    finite = number(value)
    return None if finite is None else int(finite)


def load_run(run_dir: Path) -> Run:
    """Everything that the report shows.

    Raises:
        UserError: `run_dir` is not a run directory.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory; give a run directory, which has a metrics.jsonl")
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{run_dir} has no metrics.jsonl, so there is nothing to report; "
            "give the directory of a run that has started training"
        )
    notes: list[str] = []
    metrics = _metrics(path, notes)
    classes = _json(run_dir / "classes.json", list, notes)
    config = run_dir / "config.yaml"
    return Run(
        name=run_dir.resolve().name,
        directory=run_dir,
        metrics=metrics,
        summary=_json(run_dir / "summary.json", dict, notes),
        env=_json(run_dir / "env.json", dict, notes),
        evaluation=_json(run_dir / "evaluation.json", dict, notes),
        test=_json(run_dir / "evaluation_test.json", dict, notes),
        train_counts=_train_counts(run_dir / "index" / "train.npz"),
        samples={path.stem: path.read_bytes() for path in sorted(run_dir.glob("samples/*.jpg")) if path.is_file()},
        classes=[str(name) for name in classes],
        config=config.read_text("utf-8", errors="replace") if config.is_file() else None,
        notes=notes,
    )


def _train_counts(path: Path) -> dict[str, int]:
    """Training images by class; empty if there is no list of them that can be read."""
    if not path.is_file():
        return {}
    import numpy as np  # not needed for a run without a list of images

    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = os.fsdecode(arrays["classes"].tobytes()).split("\0")
            counts = np.bincount(arrays["targets"], minlength=len(names)).tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}
    return dict(zip(names, counts, strict=False))


def _json(path: Path, kind: type[Any], notes: list[str]) -> Any:
    """The JSON in `path`. An empty `kind` if there is no file, or, with a note, if it holds something else."""
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        notes.append(f"{path.name} could not be read and is left out.")
        return kind()
    return value


def _metrics(path: Path, notes: list[str]) -> list[Metric]:
    """The lines, sorted by step. Where a resumed run repeated steps, the later line is taken."""
    kept: dict[tuple[str, str], list[tuple[int, Metric]]] = {}
    bad = 0
    lines = path.read_text("utf-8", errors="replace").split("\n")
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        metric = _metric(line)
        if metric is None:
            bad += i < len(lines) - 1  # the run may be writing the last line just now
            continue
        series = kept.setdefault((metric.split, metric.window), [])
        while series and series[-1][1].step >= metric.step:
            series.pop()
        series.append((i, metric))
    if bad:
        notes.append(f"{bad:,} line{'s' if bad > 1 else ''} of metrics.jsonl could not be read.")
    ordered = sorted((pair for series in kept.values() for pair in series), key=lambda p: (p[1].step, p[0]))
    return [metric for _, metric in ordered]


def _metric(line: str) -> Metric | None:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = integer(raw.get("step")) if isinstance(raw, dict) else None
    if step is None or step < 0:
        return None
    split = str(raw.get("split", ""))
    return Metric(
        step,
        integer(raw.get("epoch")) or 0,
        str(raw.get("stage", "")),
        split,
        str(raw.get("window", "interval")) if split == "train" else "",
        number(raw.get("loss")),
        number(raw.get("top1")),
        number(raw.get("top5")),
        number(raw.get("macro_f1")),
        number(raw.get("balanced_accuracy")),
        number(raw.get("lr")),
        number(raw.get("images_per_second")),
        number(raw.get("samples_seen")),
        number(raw.get("time")),
        number(raw.get("seconds")),
        number(raw.get("data_wait_seconds")),
    )
