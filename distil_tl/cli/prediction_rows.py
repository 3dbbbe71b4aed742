"""Rows of predictions: CSV, or a JSON object on each line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from distil_tl.utils.csv_rows import CsvWriter


@dataclass(frozen=True)
class RowFormat:
    """What a row has.

    Attributes:
        name: csv or jsonl.
        top: the most probable classes in a row.
        all_classes: whether a row also has the probability of each class.
        excel: a CSV that Excel opens where numbers have a decimal comma: with a byte order mark, semicolons and commas.
    """

    name: str = "csv"
    top: int = 1
    all_classes: bool = False
    excel: bool = False


def write_rows(
    file: TextIO, files: list[Path], predictions: Iterable[Tensor | str], classes: list[str], shape: RowFormat
) -> int:
    """Write a row for each file; return how many could not be read.

    Args:
        predictions: for each file its probabilities, float [C], or the reason why it can't be read.
    """
    write = _csv_writer(file, classes, shape) if shape.name == "csv" else _json_writer(file, classes, shape)
    unreadable = 0
    for path, prediction in zip(files, predictions, strict=True):
        unreadable += isinstance(prediction, str)
        write(path, prediction)
    return unreadable


def _top(prediction: Tensor, count: int) -> list[tuple[int, float]]:
    """The most probable classes; of equal ones the first."""
    order = prediction.argsort(descending=True, stable=True)[:count].tolist()
    return [(i, float(prediction[i])) for i in order]


def _csv_writer(file: TextIO, classes: list[str], shape: RowFormat) -> Callable[[Path, Tensor | str], None]:
    count = min(shape.top, len(classes))
    numbered = [f"{name}_{i}" for i in range(2, count + 1) for name in ("prediction", "probability")]
    columns = [f"p({name})" for name in classes] if shape.all_classes else []
    if shape.excel:
        file.write("\ufeff")
    writer = CsvWriter(file, ";" if shape.excel else ",")

    def number(p: float) -> str:
        return f"{p:.6f}".replace(".", ",") if shape.excel else f"{p:.6f}"

    writer.writerow(["path", "prediction", "probability", *numbered, *columns, "error"])

    def write(path: Path, prediction: Tensor | str) -> None:
        if isinstance(prediction, str):
            writer.writerow([path, *[""] * (2 * count + len(columns)), prediction])
            return
        best = [cell for i, p in _top(prediction, count) for cell in (classes[i], number(p))]
        per_class = [number(p) for p in prediction.tolist()] if shape.all_classes else []
        writer.writerow([path, *best, *per_class, ""])

    return write


def _json_writer(file: TextIO, classes: list[str], shape: RowFormat) -> Callable[[Path, Tensor | str], None]:
    def write(path: Path, prediction: Tensor | str) -> None:
        row: dict[str, Any] = {"path": str(path)}
        if isinstance(prediction, str):
            row["error"] = prediction
        else:
            top = [{"class": classes[i], "probability": round(p, 6)} for i, p in _top(prediction, shape.top)]
            row |= {"prediction": top[0]["class"], "probability": top[0]["probability"]}
            row |= {"top": top} if shape.top > 1 else {}
            if shape.all_classes:
                row["probabilities"] = {name: round(p, 6) for name, p in zip(classes, prediction.tolist(), strict=True)}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return write
