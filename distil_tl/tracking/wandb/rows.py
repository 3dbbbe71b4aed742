"""Rows for W&B, one per step, from the lines of metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.utils.files import open_regular

KEPT_OF_EPOCH = ("loss", "top1", "macro_f1")  # in the curves of one stage
RESULTS = ("best", "final", "test")  # in summary.json


@dataclass
class Rows:
    """metrics.jsonl as it grows, read as one row per step. A row is complete when a line of a later step follows."""

    path: Path
    _offset: int = 0
    _step: int = -1
    _row: dict[str, Any] = field(default_factory=dict)

    def whole(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Step and row of those that are complete since the last call."""
        with open_regular(self.path) as file:
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._offset += len(text)
                try:
                    line = json.loads(text)
                    step = int(line["step"])
                except (ValueError, KeyError, TypeError):  # not a line of this package
                    continue
                if step != self._step and self._row:
                    yield self._step, self._row
                    self._row = {}
                self._step = step
                self._row.update(row_of(line))

    def last(self) -> tuple[int, dict[str, Any]]:
        """The row of the last step, which may not be complete."""
        return self._step, self._row


def row_of(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with W&B's names: curves over the whole run, and of each stage over its epochs."""
    split, whole_epoch = line["split"], line.get("window") == "epoch"
    series = "train_epoch" if split == "train" and whole_epoch else split
    numbers = _numbers(line, "step", "epoch", "n", "time")
    row = {f"{series}/{key}": value for key, value in numbers.items()}
    row |= {"epoch": line["epoch"], "stage": line["stage"]}
    if whole_epoch:
        stage = f"stage_{line['stage']}"
        row |= {f"{stage}/{split}_{key}": numbers[key] for key in KEPT_OF_EPOCH if key in numbers}
        row[f"{stage}/epoch"] = line["epoch"]
    if "time" in line:
        row["_timestamp"] = line["time"]
    return row


def summary_of(content: dict[str, Any]) -> dict[str, Any]:
    """The numbers of summary.json that describe a run at W&B, with W&B's names."""
    figures = {
        f"{name}/{key}": value for name in RESULTS for key, value in _numbers(content.get(name) or {}, "n").items()
    }
    return {**figures, "total_seconds": content.get("total_seconds")}


def _numbers(figures: dict[str, Any], *left_out: str) -> dict[str, Any]:
    return {
        key: value
        for key, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in left_out
    }
