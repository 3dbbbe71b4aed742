"""The judgement of answers: what counts as rounding, and what as another model."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from distil_tl.data.index import Index
from distil_tl.data.scan import scan
from distil_tl.export.comparison import Comparison, judge
from distil_tl.utils.errors import ExportError
from tests.helpers.image_folders import plant


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return scan(plant(tmp_path, "a/0.png", "a/1.png", "b/2.png"))


def compared(expected: list[list[float]], found: list[list[float]]) -> Comparison:
    comparison = Comparison()
    for i in range(len(expected)):
        comparison.add(
            [i], np.array(expected[i : i + 1], dtype=np.float32), np.array(found[i : i + 1], dtype=np.float32)
        )
    return comparison


def test_a_class_may_differ_only_where_pytorch_is_undecided(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tie = compared([[0.9, 0.1], [0.50001, 0.49999], [0.1, 0.9]], [[0.9, 0.1], [0.49999, 0.50001], [0.1001, 0.8999]])
    judge(tie, index, "val", ["a", "b"])
    said = caplog.text
    assert "all 3 images of val as PyTorch does in float32: the same class for all but 1" in said
    assert "a/1.png (PyTorch a, margin 2.0e-05; onnxruntime b)" in said
    other = compared([[0.9, 0.1], [0.5001, 0.4999], [0.1, 0.9]], [[0.9, 0.1], [0.4999, 0.5001], [0.1, 0.9]])
    other.answers[1] = other.answers[1]._replace(difference=1e-5)
    with pytest.raises(ExportError, match="another class than PyTorch for 1 of 3 images of val"):
        judge(other, index, "val", ["a", "b"])


@pytest.mark.parametrize("value", [0.7, float("nan")])
def test_a_large_difference_is_no_rounding(index: Index, value: float) -> None:
    comparison = compared([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]], [[0.9, 0.1], [value, 0.2], [0.1, 0.9]])
    with pytest.raises(
        ExportError, match=r"answers otherwise.*differs by (1\.0e-01|nan).*The worst image of val: a/1\.png"
    ):
        judge(comparison, index, "val", ["a", "b"])


def test_a_single_class_has_no_margin(index: Index) -> None:
    judge(compared([[1.0]] * 3, [[1.0]] * 3), index, "val", ["a"])
