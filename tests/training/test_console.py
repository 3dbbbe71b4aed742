"""What a run prints."""

from __future__ import annotations

import pytest

from distil_tl.rundir.state import Position
from distil_tl.training.config import StageConfig
from distil_tl.training.console import time_left
from distil_tl.utils.log import duration

STAGES = {"head": StageConfig(epochs=3), "skipped": StageConfig(epochs=0), "full": StageConfig(epochs=5)}


@pytest.mark.parametrize(
    ("stage", "epoch", "expected"),
    [
        ("head", 0, "about 40 s left, then full"),
        ("head", 2, "next: full"),
        ("full", 0, "about 1 min left"),
        ("full", 4, ""),
    ],
)
def test_the_time_left_of_a_stage(stage: str, epoch: int, expected: str) -> None:
    assert time_left(STAGES, Position(stage, epoch, 0, 0), 20.0) == expected


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (0.4, 59, 61, 3599, 3600, 7500, 90000)]
    assert shown == ["0 s", "59 s", "1 min", "59 min", "1 h", "2 h 5 min", "1 d 1 h"]
