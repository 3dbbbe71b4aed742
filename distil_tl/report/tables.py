"""The tables: stages, classes, mistakes, environment."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any

from distil_tl.report import text
from distil_tl.report.load import Band, Metric, Run, mapping
from distil_tl.report.markup import Child, Markup, h, join
from distil_tl.report.text import number
from distil_tl.utils.data_wait import wait_share
from distil_tl.utils.log import printable

MAX_STACKED = 100  # rows
WORST_CLASSES = 25  # shown at once; the others unfold
MAX_CLASSES = 1000


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], *, texts: int = 1, label: str = "") -> Markup:
    """A table that scrolls horizontally if it is too wide. The first `texts` columns are text, the others numbers.

    On a narrow screen each row of a short table becomes a block with a line for each column.
    """
    stacks = len(rows) <= MAX_STACKED

    def cells(row: Sequence[Child]) -> list[Markup]:
        kinds = [None if i < texts else "n" for i in range(len(row))]
        labels = head if stacks else [None] * len(row)
        return [
            h("td", h("span", cell), class_=kind, data_label=label) if stacks else h("td", cell, class_=kind)
            for cell, kind, label in zip(row, kinds, labels, strict=True)
        ]

    body = [h("tr", h("th", row[0], scope="row"), cells(row)[1:]) for row in rows]
    top = [h("th", cell, scope="col", class_=None if i < texts else "n") for i, cell in enumerate(head)]
    return h(
        "div",
        h("table", h("thead", h("tr", top)), h("tbody", body)),
        class_="scroll stack" if stacks else "scroll",
        tabindex="0",
        role="region",
        aria_label=label or None,
    )


def bar(fraction: float | None, shown: str, style: str = "") -> Markup:
    """A number with a small bar on its left."""
    width = min(max(fraction or 0.0, 0.0), 1.0) * 100
    track = h("span", h("i", style=f"width:{width:.1f}%"), class_=f"bar {style}".strip(), aria_hidden="true")
    return join(track, h("span", shown, class_="v"))


def stage_table(run: Run) -> Markup:
    """The cost of each stage, its best top-1 on val, and the gain over the best of the stages before it."""
    stages = mapping(run.summary, "stages")
    bands = {band.name: band for band in run.bands}
    names = [*bands, *(name for name in stages if name not in bands)]
    if not names:
        return h("p", "No stage has started.", class_="empty")
    total = sum(number(mapping(stages, name).get("seconds")) or 0.0 for name in names)
    best: float | None = None
    rows: list[list[Child]] = []
    for name in names:
        lines = [m for m in run.metrics if m.stage == name]
        scores = [m.top1 for m in lines if m.split == "val" and m.top1 is not None]
        top1 = max(scores, default=number(mapping(stages, name).get("top1")))
        gain = None if top1 is None or best is None else top1 - best
        cost = _stage_cost(name, mapping(stages, name), lines, bands.get(name), total)
        rows.append([*cost, text.percent(top1), text.percentage_points(gain)])
        best = max((v for v in (best, top1) if v is not None), default=None)
    head = [
        "Stage",
        "Epochs",
        "Steps",
        "Trainable",
        "Images",
        "Images/s",
        "Time",
        "Best val top-1",
        "Gain (points)",
    ]
    return table(head, rows, label="Stages")


def interpolation_tables(run: Run) -> list[Markup]:
    """Figures of the interpolated weights of each stage with `wise_ft`, by alpha."""
    found = []
    for name, stage in mapping(run.summary, "stages").items():
        result = mapping(stage if isinstance(stage, dict) else {}, "wise_ft")
        figures = result.get("figures")
        rows: list[list[Child]] = []
        for row in figures if isinstance(figures, list) else []:
            if isinstance(row, dict) and (alpha := number(row.get("alpha"))) is not None:
                mark = " (chosen)" if alpha == number(result.get("alpha")) else ""
                loss = number(row.get("loss"))
                shown = text.MISSING if loss is None else f"{loss:.4f}"
                rows.append([f"{alpha:g}{mark}", text.percent(number(row.get("top1"))), shown])
        if rows:
            label = f"Interpolated weights of stage {name}"
            found.append(
                h("div", h("h3", f"Stage {name}"), table(["Alpha", "Val top-1", "Val loss"], rows, label=label))
            )
    return found


def soup_table(run: Run) -> Markup | None:
    """The checkpoints of an average, and those that were left out; None for a run that was trained."""
    parts, rows = run.summary.get("soup"), list[list[Child]]()
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict):
            shown = [number(part.get(key)) for key in ("alone", "average")]
            figures = [text.MISSING if value is None else f"{value:.4f}" for value in shown]
            rows.append(
                [
                    printable(f"{part.get('run')} {part.get('checkpoint')}"),
                    *figures,
                    "yes" if part.get("added") else "no",
                ]
            )
    head = ["Checkpoint", f"Val {run.metric.replace('_', ' ')} alone", "Average with it", "Added"]
    return table(head, rows, label="Checkpoints of the average") if rows else None


def peak_memory(run: Run) -> Markup | None:
    """The peak memory of each stage, of the rank with the highest; None for a run of earlier code."""
    stages = mapping(run.summary, "stages")
    peaks = {name: number(mapping(stages, name).get("peak_memory_mb")) for name in stages}
    shown = [(name, f"{peak / 1024:.1f}{text.SPACE}GiB") for name, peak in peaks.items() if peak]
    if not shown:
        return None
    return h(
        "dl",
        [h("div", h("dt", f"Peak memory of a rank, {name}"), h("dd", peak)) for name, peak in shown],
        class_="line",
    )


def data_waits(run: Run) -> Markup | None:
    """How long each stage waited for data; None for a run of earlier code."""
    shares = {name: data_wait(run, name) for name in (band.name for band in run.bands)}
    known = [(name, text.percent(share)) for name, share in shares.items() if share is not None]
    if not known:
        return None
    return h(
        "dl", [h("div", h("dt", f"Waiting for data, {name}"), h("dd", share)) for name, share in known], class_="line"
    )


def data_wait(run: Run, stage: str) -> float | None:
    """The share of its training for which a stage waited for data; None for a run of earlier code."""
    share = wait_share(mapping(mapping(run.summary, "stages"), stage), "train_seconds")
    if share is not None:
        return share
    lines = [m for m in run.lines("train", "interval") if m.stage == stage]
    known = [(m.data_wait_seconds, m.seconds) for m in lines if m.data_wait_seconds is not None and m.seconds]
    waited, seconds = (sum(column) for column in zip(*known, strict=True)) if known else (None, None)
    return wait_share({"data_wait_seconds": waited, "seconds": seconds})


def part_sizes(run: Run) -> list[str]:
    """A sentence for each stage in which memory ran out: how many images went through the network at once."""
    stages = mapping(run.summary, "stages")
    sizes = {name: mapping(mapping(stages, name), "part_sizes") for name in stages}
    return [
        f"Memory ran out in stage {name}, so batches went through the network in parts: "
        + ", ".join(f"{text.count(number(size))} images at once in {work}" for work, size in by_work.items())
        + "."
        for name, by_work in sizes.items()
        if by_work
    ]


def early_ends(run: Run) -> list[str]:
    """A sentence for each stage that ended early."""
    stages = mapping(run.summary, "stages")
    records = {name: mapping(stages, name) for name in stages}
    return [
        f"Stage {name} ended early, after {text.count(number(record.get('epochs')))} epochs, and its best weights, of "
        f"epoch {text.count(number(mapping(record, 'best').get('epoch')))}, were kept: later epochs were not better."
        for name, record in records.items()
        if record.get("stopped_early") is True
    ]


def _stage_cost(
    name: str, record: dict[str, Any], lines: Sequence[Metric], band: Band | None, total_seconds: float
) -> list[Child]:
    """A stage's columns from its name to its time: from summary.json, or from its metrics where that has no value."""
    tag = h("span", "cached", class_="tag", title="trained on cached features")
    epochs, seconds = number(record.get("epochs")), number(record.get("seconds"))
    if epochs is None:
        epochs = max((m.epoch for m in lines), default=None)
    speed = number(record.get("images_per_second"))
    if speed is None:
        speeds = [m.images_per_second for m in lines if m.split == "train" and m.images_per_second is not None]
        speed = median(speeds) if speeds else None
    time = text.duration(seconds)
    return [
        [name, tag if record.get("cached") is True else None],
        text.count(epochs),
        f"{band.start:,}\u2013{band.end:,}" if band else text.MISSING,
        text.compact(number(record.get("trainable_parameters"))),
        text.count(number(record.get("train_images"))),
        text.rate(speed),
        bar(seconds / total_seconds, time, "wide") if seconds is not None and total_seconds else time,
    ]


def class_table(run: Run, evaluation: dict[str, Any], confused: dict[str, str]) -> Markup | None:
    """Classes by F1, lowest first.

    Args:
        evaluation: the content of evaluation.json, or that of another split.
        confused: the most frequent wrong prediction of each class.
    """
    entries = entries_of(evaluation, "per_class")
    if not entries:
        return None

    def rank(entry: dict[str, Any]) -> tuple[float, float]:
        f1, recall = number(entry.get("f1")), number(entry.get("recall"))
        return (2.0 if f1 is None else f1, 2.0 if recall is None else recall)

    rows: list[list[Child]] = []
    for entry in sorted(entries, key=rank)[:MAX_CLASSES]:
        name, f1 = class_name(run, entry.get("class")), number(entry.get("f1"))
        row: list[Child] = [name]
        if confused:
            row.append(confused.get(name, ""))
        row += [
            bar(f1, text.percent(f1), "weak" if f1 is not None and f1 < 0.5 else ""),
            text.percent(number(entry.get("recall"))),
            text.percent(number(entry.get("precision"))),
            f"{text.count(number(entry.get('correct')))} / {text.count(number(entry.get('n')))}",
        ]
        if run.train_counts:
            row.append(text.count(run.train_counts.get(name)))
        rows.append(row)
    head = ["Class", *(["Most confused with"] if confused else [])]
    texts = len(head)
    head += ["F1", "Recall", "Precision", "Correct", *(["Trained on"] if run.train_counts else [])]
    first = table(head, rows[:WORST_CLASSES], texts=texts, label="Classes, lowest F1 first")
    rest = rows[WORST_CLASSES:]
    if not rest:
        return first
    left_out = len(entries) - len(rows)
    more = f"{len(rest):,} more classes" + (f" ({left_out:,} with a higher F1 are not shown)" if left_out else "")
    return join(first, h("details", h("summary", more), table(head, rest, texts=texts, label="More classes")))


def entries_of(evaluation: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The mappings in a list of evaluation.json."""
    values = evaluation.get(key)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def class_name(run: Run, value: object) -> str:
    """The name of a class, which the files give as a name or as an index."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(run.classes):
        return run.classes[value]
    return text.MISSING if value is None else str(value)


def environment_table(run: Run) -> Markup | None:
    """env.json, with nested keys joined by dots."""
    rows: list[list[Child]] = []

    def add(key: str, value: object) -> None:
        if isinstance(value, dict):
            for inner, part in value.items():
                add(f"{key}.{inner}" if key else str(inner), part)
        elif isinstance(value, list):
            rows.append([key, h("code", shlex.join(str(part) for part in value))])
        else:
            is_time = key in ("start_time", "end_time")
            shown = text.timestamp(value) if is_time else text.MISSING if value is None else str(value)
            rows.append([key, h("code", shown) if key == "command" else shown])

    add("", run.env)
    return table(["Key", "Value"], rows, texts=2, label="Environment") if rows else None
