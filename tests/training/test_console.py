"""What a run prints."""

from __future__ import annotations

import pytest

from distil_tl.training.console import left_out
from distil_tl.training.remaining import planned_epochs, time_left
from distil_tl.utils.log import duration

EPOCHS = {"head": 3, "skipped": 0, "full": 5}


@pytest.mark.parametrize(
    ("stage", "done", "expected"),
    [
        ("head", 1, "about 40 s left, then full"),
        ("head", 3, "next: full"),
        ("full", 1, "about 1 min left"),
        ("full", 5, ""),
    ],
)
def test_the_time_left_of_a_stage(stage: str, done: int, expected: str) -> None:
    assert time_left(EPOCHS, stage, done, 20.0) == expected


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (0.4, 59, 61, 3599, 3600, 7500, 90000)]
    assert shown == ["0 s", "59 s", "1 min", "59 min", "1 h", "2 h 5 min", "1 d 1 h"]


def test_a_stage_that_ended_early_counts_with_the_epochs_it_had() -> None:
    stages = {"head": {"epochs": 9}, "full": {"epochs": 5}}
    assert planned_epochs(stages, {}) == {"head": 9, "full": 5}
    state = {"stages": {"head": {"epochs": 3, "stopped_early": True}, "full": {"epochs": 1, "stopped_early": False}}}
    assert planned_epochs(stages, state) == {"head": 3, "full": 5}


@pytest.mark.parametrize(
    ("images", "batch", "ranks", "way"),
    [
        (84, 32, 1, "data.global_batch_size=28 leaves out 0"),
        (84, 32, 4, "=28 leaves out 0"),
        (84, 32, 8, "=16 leaves out 4"),
    ],
)
def test_many_images_in_no_batch_are_said_with_a_way_out(images: int, batch: int, ranks: int, way: str) -> None:
    note = left_out(images, batch, ranks)
    assert note.startswith("20 of 84 images (24%) are left out of each epoch, each time others; ")
    assert note.endswith(way)


def test_few_images_in_no_batch_are_not_said() -> None:
    assert left_out(70, 32, 1) == ""
    assert left_out(71, 32, 1) == ""
    assert left_out(72, 32, 1) != ""
