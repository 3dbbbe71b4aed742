"""The time for which training and evaluations wait for batches, by a clock that the test sets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distil_tl.data.loader import Batch
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.state import RunState, StageRecord
from distil_tl.training import console
from distil_tl.training.evaluation import evaluate
from distil_tl.training.metrics import ClassificationMetrics, Meter
from distil_tl.training.records import Moment, Records
from distil_tl.training.step import StageTraining

ALONE = DistInfo(Launch(), torch.device("cpu"), 1.0)
BATCH = Batch(torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([True, True]), [])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def slow(clock: list[float], *seconds: float) -> Iterator[Batch]:
    for each in seconds:
        clock[0] += each
        yield BATCH


def test_waiting_for_a_batch_counts_until_the_end_of_the_interval(clock: list[float]) -> None:
    batches = slow(clock, 3, 1, 2)
    training: Any = SimpleNamespace(batches=SimpleNamespace(next=lambda: next(batches)), meter=Meter(ALONE, 2))
    training.meter.start()
    for _ in range(2):
        StageTraining.next_batch(training)
        clock[0] += 10  # of computation
    assert training.meter.interval()[1:] == (24.0, 4.0)
    StageTraining.next_batch(training)
    assert training.meter.interval()[1:] == (2.0, 2.0)


def test_waiting_survives_a_restart(clock: list[float]) -> None:
    meter = Meter(ALONE, 2)
    meter.waited = 4.0
    state, resumed = meter.state(), Meter(ALONE, 2)
    resumed.load_state(state)
    resumed.waited += 1.0
    assert resumed.interval()[2] == 5.0
    del state["data_wait_seconds"]  # as in a checkpoint of earlier code
    resumed.load_state(state)
    assert resumed.interval()[2] == 0.0


def test_an_evaluation_measures_its_own(clock: list[float]) -> None:
    network: Any = nn.Linear(3, 2)
    network.is_compiled = False
    assert evaluate(ALONE, network, 2, slow(clock, 3, 1), 2).waited == 4.0


def test_the_records_of_a_stage(clock: list[float]) -> None:
    written: list[dict[str, Any]] = []
    state = RunState(stages={"head": StageRecord()})
    records, at = Records(state, written.append, 8), Moment("head", 0, 0.1)
    counted = ClassificationMetrics(2, ALONE.device)
    lines = [records.add_interval(at, counted, 10.0, waited) for waited in (1.0, 4.0)]
    lines.append(records.add_epoch(at, counted))
    records.add_evaluation(at, counted, 5.0, 0.5)
    lines.append(records.add_interval(at, counted, 10.0, 2.0))
    lines.append(records.add_epoch(at, counted))
    assert [line["data_wait_seconds"] for line in lines] == [1.0, 4.0, 5.0, 2.0, 2.0]
    assert [line["data_wait_seconds"] for line in written if line["split"] == "val"] == [0.5]
    summary = state.stages["head"].summary()
    assert (summary["data_wait_seconds"], summary["train_seconds"]) == (7.0, 30.0)
    assert "epoch_data_wait_seconds" not in summary
    assert console.waiting(lines[0]) == ""
    assert console.waiting(lines[1]) == "  waited for data 40% of the time"
