"""Images on the page: mistakes, uncertain ones, and what training sees."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from distil_tl.report import text
from distil_tl.report.load import Run
from distil_tl.report.markup import Child, Markup, h, join
from distil_tl.report.tables import bar, class_name, entries_of, table
from distil_tl.report.text import number

MAX_MISTAKES = 100
MAX_THUMBNAILS = 24
THUMBNAIL = 64  # pixels
MAX_IMAGE_BYTES = 32 * 2**20
MAX_IMAGE_PIXELS = 50_000_000


def mistake_table(run: Run) -> Markup | None:
    """The most confident mistakes, the first ones with thumbnails."""
    entries = entries_of(run.evaluation, "mistakes")
    entries.sort(key=lambda e: -(number(e.get("probability")) or 0.0))
    return _image_table(run, entries[:MAX_MISTAKES], "mistakes")


def uncertain_table(run: Run) -> Markup | None:
    """The images whose two most probable classes are closest, right or wrong; None for a run of earlier code."""
    entries = entries_of(run.evaluation, "uncertain")
    return _image_table(run, entries[:MAX_THUMBNAILS], "uncertain images")


def _image_table(run: Run, entries: list[dict[str, Any]], what: str) -> Markup | None:
    """A row for each image: its true class, and the predicted classes with their probabilities."""
    if not entries:
        return None
    rows: list[list[Child]] = []
    for i, entry in enumerate(entries):
        path = str(entry.get("path", text.MISSING))
        source = thumbnail(path, run.intensity) if i < MAX_THUMBNAILS else None
        image = h("img", src=source, alt="", class_="thumb") if source else None
        probability, own = number(entry.get("probability")), number(entry.get("target_probability"))
        target, prediction = class_name(run, entry.get("target")), class_name(run, entry.get("prediction"))
        row: list[Child] = [
            h("div", image, h("span", run.relative(path), class_="path"), class_="shot"),
            [target, h("div", text.percent(own), class_="below") if own is not None else None],
            [prediction, h("div", _others(entry), class_="below")],
            bar(probability, text.percent(probability), "" if target == prediction else "weak"),
        ]
        rows.append(row)
    head = ["Image", "True class", "Predicted class", "Probability"]
    first = table(head, rows[:MAX_THUMBNAILS], texts=3, label=what.capitalize())
    rest = rows[MAX_THUMBNAILS:]
    if not rest:
        return first
    more = h("summary", f"{len(rest):,} more {what}")
    return join(first, h("details", more, table(head, rest, texts=3, label=f"More {what}")))


def _others(entry: dict[str, Any]) -> str:
    """The next probable classes; empty for a run of earlier code."""
    top = entries_of(entry, "top")[1:]
    return ", ".join(f"{found.get('class')} {text.percent(number(found.get('probability')))}" for found in top)


def sample_strips(run: Run) -> list[Markup]:
    """Some training images of each stage, as augmented."""
    found = []
    order = {band.name: i for i, band in enumerate(run.bands)}
    for stage, content in sorted(run.samples.items(), key=lambda pair: order.get(pair[0], len(order))):
        source = "data:image/jpeg;base64," + base64.b64encode(content).decode()
        caption = h("figcaption", h("h3", stage))
        found.append(
            h("figure", caption, h("img", src=source, alt=f"Training images of stage {stage}", class_="strip-of"))
        )
    return found


def thumbnail(path: str, intensity: Any = "dtype") -> str | None:
    """The image at `path` as a small data URI; None if it can't be read or is too large.

    Args:
        intensity: as `data.intensity`.
    """
    try:
        from PIL import Image  # not needed for --help, nor for a report without thumbnails

        from distil_tl.data.pillow import open_image, pixels_of

        source = Path(path)
        if not source.is_file() or source.stat().st_size > MAX_IMAGE_BYTES:
            return None
        with source.open("rb") as file:
            image = open_image(file)
            if image is None or image.width * image.height > MAX_IMAGE_PIXELS:
                return None
            image.draft(None, (THUMBNAIL * 2, THUMBNAIL * 2))
            small = Image.fromarray(pixels_of(image, intensity))  # as the model saw it
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
    except Exception:  # a thumbnail is optional, and decoders raise many kinds of exceptions
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
