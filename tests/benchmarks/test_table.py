"""The benchmark of large tables measures each step."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.table import measure, write_table


def test_each_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path / "labels.csv", rows=500, classes=7)
    measure(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == ["table", "split", "write split.csv", "read split.csv"]
    assert (tmp_path / "split.csv").read_text().count(",val,") == 98
