"""Folders of files for scans, and the comparison of indexes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from distil_tl.data.index import Index
from distil_tl.data.scan import scan


def plant(root: Path, *files: str) -> Path:
    """Write each file below `root`, holding as many bytes as its relative path is long."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    return root


def assert_as_torchvision(root: Path) -> Index:
    ours, theirs = scan(root), ImageFolder(root)
    assert list(ours.classes) == theirs.classes
    assert ours.class_to_idx == theirs.class_to_idx
    assert ours.samples == theirs.samples
    assert ours.targets.tolist() == theirs.targets
    assert [str(ours.path(i)) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert ours.sizes.tolist() == [os.stat(path).st_size for path, _ in theirs.samples]  # noqa: PTH116
    return ours


def assert_equal(a: Index, b: Index) -> None:
    for field in dataclasses.fields(Index):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert type(left) is type(right)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            assert left.tolist() == right.tolist()
        else:
            assert left == right
