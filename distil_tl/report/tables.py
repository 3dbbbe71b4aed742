"""The tables: stages, classes, mistakes, environment."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from distil_tl.report import text
from distil_tl.report.load import Run, section
from distil_tl.report.markup import Child, Markup, h, join
from distil_tl.report.text import number

WORST_CLASSES = 25
MAX_CLASSES = 1000
MAX_MISTAKES = 100
MAX_THUMBNAILS = 24
THUMBNAIL = 64
MAX_IMAGE_BYTES = 32 * 2**20
MAX_IMAGE_PIXELS = 50_000_000


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], *, texts: int = 1, label: str = "") -> Markup:
    """A table that scrolls sideways by itself; the first `texts` columns are words, the others numbers."""

    def cells(tag: str, row: Sequence[Child]) -> list[Markup]:
        return [h(tag, cell, class_=None if i < texts else "n") for i, cell in enumerate(row)]

    body = [h("tr", h("th", row[0], scope="row"), cells("td", row)[1:]) for row in rows]
    top = [h("th", cell, scope="col", class_=None if i < texts else "n") for i, cell in enumerate(head)]
    return h(
        "div",
        h("table", h("thead", h("tr", top)), h("tbody", body)),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=label or None,
    )


def bar(fraction: float | None, shown: str, style: str = "") -> Markup:
    """A number with a small bar behind its left."""
    width = min(max(fraction or 0.0, 0.0), 1.0) * 100
    track = h("span", h("i", style=f"width:{width:.1f}%"), class_=f"bar {style}".strip(), aria_hidden="true")
    return join(track, h("span", shown, class_="v"))


def stage_table(run: Run) -> Markup:
    """What every stage cost and what it brought."""
    stages = section(run.summary, "stages")
    names = [band.name for band in run.bands]
    names += [name for name in stages if name not in names]
    if not names:
        return h("p", "No stage has begun.", class_="empty")
    seconds = {name: number(section(stages, name).get("seconds")) for name in names}
    total = sum(value or 0.0 for value in seconds.values())
    before: float | None = None
    steps = {band.name: band for band in run.bands}
    rows: list[list[Child]] = []
    tag = h("span", "cached", class_="tag", title="trained on features computed once")
    for name in names:
        told = section(stages, name)
        lines = [m for m in run.metrics if m.stage == name]
        scores = [m.top1 for m in lines if m.split == "val" and m.top1 is not None]
        top1 = max(scores, default=number(told.get("top1")))
        epochs = number(told.get("epochs"))
        if epochs is None:
            epochs = max((m.epoch for m in lines), default=None)
        took, speed = seconds[name], number(told.get("images_per_second"))
        if speed is None:
            speeds = [m.images_per_second for m in lines if m.split == "train" and m.images_per_second is not None]
            speed = median(speeds) if speeds else None
        gain = None if top1 is None or before is None else top1 - before
        band = steps.get(name)
        rows.append(
            [
                [name, tag if told.get("cached") is True else None],
                text.count(epochs),
                f"{band.start:,}\u2013{band.end:,}" if band else text.NOTHING,
                text.short(number(told.get("trainable_parameters"))),
                text.count(number(told.get("train_images"))),
                text.rate(speed),
                bar(took / total, text.duration(took), "wide") if took is not None and total else text.duration(took),
                text.percent(top1),
                text.points(gain),
            ]
        )
        before = max((v for v in (before, top1) if v is not None), default=None)
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


def class_table(run: Run, confused: dict[str, str]) -> Markup | None:
    """Classes by F1, worst first; `confused` says what each is most often taken for."""
    found = run.evaluation.get("per_class")
    entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
    if not entries:
        return None

    def worst(entry: dict[str, Any]) -> tuple[float, float]:
        f1, recall = number(entry.get("f1")), number(entry.get("recall"))
        return (2.0 if f1 is None else f1, 2.0 if recall is None else recall)

    rows: list[list[Child]] = []
    for entry in sorted(entries, key=worst)[:MAX_CLASSES]:
        name, f1 = class_name(run, entry.get("class")), number(entry.get("f1"))
        row: list[Child] = [name]
        if confused:
            row.append(confused.get(name, ""))
        row += [
            bar(f1, text.percent(f1), "weak" if f1 is not None and f1 < 0.5 else ""),
            text.percent(number(entry.get("recall"))),
            text.percent(number(entry.get("precision"))),
            text.count(number(entry.get("correct"))),
            text.count(number(entry.get("n"))),
        ]
        rows.append(row)
    head = ["Class", *(["Most often taken for"] if confused else [])]
    head += ["F1", "Recall", "Precision", "Correct", "Images"]
    texts = len(head) - 5
    first = table(head, rows[:WORST_CLASSES], texts=texts, label="Classes, worst first")
    rest = rows[WORST_CLASSES:]
    if not rest:
        return first
    left_out = len(entries) - len(rows)
    more = f"The other {len(rest):,} classes" + (f" ({left_out:,} better ones left out)" if left_out else "")
    return join(
        first,
        h("details", h("summary", more), table(head, rest, texts=texts, label="The other classes")),
    )


def class_name(run: Run, value: object) -> str:
    """A class as its name; files may say its index."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(run.classes):
        return run.classes[value]
    return text.NOTHING if value is None else str(value)


def mistake_table(run: Run) -> Markup | None:
    """The mistakes the model was surest of."""
    found = run.evaluation.get("mistakes")
    entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
    if not entries:
        return None
    entries.sort(key=lambda e: -(number(e.get("probability")) or 0.0))
    shown = entries[:MAX_MISTAKES]
    pictures = [thumbnail(str(e.get("path"))) for e in shown[:MAX_THUMBNAILS]]
    pictures += [None] * (len(shown) - len(pictures))
    rows: list[list[Child]] = []
    for entry, picture in zip(shown, pictures, strict=True):
        probability = number(entry.get("probability"))
        image = h("img", src=picture, alt="", class_="thumb") if picture else None
        rows.append(
            [
                h(
                    "div",
                    image,
                    h("span", str(entry.get("path", text.NOTHING)), class_="path"),
                    class_="shot",
                ),
                class_name(run, entry.get("target")),
                class_name(run, entry.get("prediction")),
                bar(probability, text.percent(probability), "weak"),
            ]
        )
    head = ["Image", "True class", "Predicted", "Probability"]
    first = table(head, rows[:MAX_THUMBNAILS], texts=3, label="Mistakes")
    rest = rows[MAX_THUMBNAILS:]
    if not rest:
        return first
    more = h("summary", f"{len(rest):,} more mistakes")
    return join(first, h("details", more, table(head, rest, texts=3, label="More mistakes")))


def thumbnail(path: str) -> str | None:
    """The image at `path` as a small data URI; None when there is none, or it is not worth reading."""
    try:
        # Here, so that a report without pictures needs no Pillow.
        from PIL import Image, ImageOps

        file = Path(path)
        if not file.is_file() or file.stat().st_size > MAX_IMAGE_BYTES:
            return None
        with Image.open(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                return None
            image.draft("RGB", (THUMBNAIL * 2, THUMBNAIL * 2))
            small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
    except Exception:  # a picture is a nicety, and decoders fail in more ways than can be listed
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def environment_table(run: Run) -> Markup | None:
    """env.json, nested keys joined with dots."""
    rows: list[list[Child]] = []

    def add(key: str, value: object) -> None:
        if isinstance(value, dict):
            for inner, part in value.items():
                add(f"{key}.{inner}" if key else str(inner), part)
        elif isinstance(value, list):
            rows.append([key, h("code", shlex.join(str(part) for part in value))])
        else:
            at = key in ("start_time", "end_time")
            shown = text.moment(value) if at else text.NOTHING if value is None else str(value)
            rows.append([key, h("code", shown) if key == "command" else shown])

    add("", run.env)
    return table(["Key", "Value"], rows, texts=2, label="Environment") if rows else None
