"""The benchmark of the ends of epochs: what it records, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import epoch_boundary
from benchmarks.epoch_boundary import SCENARIOS, Task
from benchmarks.measure import Measured, Results
from tests.helpers.ranks import run_ranks


def test_waits_are_recorded_by_epoch(folder: Path, tmp_path: Path) -> None:
    task = Task(str(folder), str(tmp_path / "run"), 1, 8, 32, 3, 0.1, 0.001)
    (found,) = run_ranks(1, epoch_boundary.run_one, task)  # a process, as it replaces functions of the package
    assert [(len(epoch["train"]), len(epoch["val"])) for epoch in found["epochs"]] == [(6, 4)] * 2
    assert all(0 < sum(epoch["train"]) + sum(epoch["val"]) < epoch["seconds"] for epoch in found["epochs"])


def test_the_table(tmp_path: Path) -> None:
    options = epoch_boundary.parse(["--repeats", "1", "--out", str(tmp_path / "b.json")])
    results = Results(options.out, {})
    results.once("seconds of the loader for a batch", lambda: 0.25)
    for i, scenario in enumerate(SCENARIOS):
        epochs = [{"seconds": 9.0 + i, "train": [0.5, 0.25], "val": [0.125]}]
        results.add(f"{scenario}, this code", 0, Measured(0.0, 9.0, 9.0, 9.0, 3.0, 0.0), epochs=epochs)
    text = epoch_boundary.report(results, ["this code"], options)
    assert "2 loader processes that need 0.25 s for a batch together" in text
    assert "| training-bound | this code | 0.50 | 0.75 | 0.12 | 0.12 | 9.00 |" in text
    assert "| loader-bound | this code | 0.50 | 0.75 | 0.12 | 0.12 | 10.00 |" in text


@pytest.mark.parametrize("args", [["--epochs", "1"], ["--workers", "0"], ["--repeats", "0"]])
def test_wrong_options_are_refused(args: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        epoch_boundary.main(args)
    assert error.value.code == 2
