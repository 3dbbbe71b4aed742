"""metrics.jsonl: what is written, and what stays when a run is resumed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.helpers.metrics_lines import line, lines, steps, tracker


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    record = tracker(tmp_path)
    began = time.time()
    record.log(line(1))
    (entry,) = lines(tmp_path)
    assert began - 1 < entry.pop("time") < time.time() + 1
    assert entry == line(1)
    record.log(line(2, split="val"))
    assert steps(tmp_path) == [1, 2]
    record.close("completed")


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    record = tracker(tmp_path)
    record.log(line(1, loss=float("nan"), lr=float("inf"), top1=0.5))
    record.close("completed")
    (entry,) = lines(tmp_path)
    assert (entry["loss"], entry["lr"], entry["top1"]) == (None, None, 0.5)


def test_resuming_removes_the_lines_after_the_checkpoint(tmp_path: Path):
    record = tracker(tmp_path)
    for step in (10, 20, 20, 30, 40):
        record.log(line(step))
    record.close("completed")
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close("completed")
    assert steps(tmp_path) == [10, 20, 20, 21]


def test_a_fresh_start_removes_all_lines(tmp_path: Path):
    tracker(tmp_path).log(line(1))
    tracker(tmp_path).close("failed")
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    "cut",
    [
        "",
        "{",
        '{"step": 1',
        '{"step": 15, "epoch": 0, "loss": 0.',
        '{"epoch": 0}',
        "\0\0\0",
        "12",
        '{"step": null}',
        "\xff",
    ],
)
def test_an_incomplete_last_line_is_removed(tmp_path: Path, cut: str):
    record = tracker(tmp_path)
    record.log(line(10))
    record.close("completed")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(cut.encode("latin-1"))
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close("completed")
    assert steps(tmp_path) == [10, 21]


def test_a_last_line_without_a_newline_stays(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(10)))
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close("completed")
    assert steps(tmp_path) == [10, 21]
