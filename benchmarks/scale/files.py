"""Splits of any size: an index of files that do not exist, and a real folder tree of tiny files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from distil_tl.data.index import Index

CLASSES = 1000
NAME = "class-{:04d}/image-{:08d}.jpg"  # 29 bytes, as ImageNet's: n01440764/n01440764_10026.JPEG has 30


def synthetic_index(count: int, root: str = "/nowhere") -> Index:
    """An index of `count` files in 1,000 classes, made without reading a disk."""
    width = len(NAME.format(0, 0))
    targets = (np.arange(count, dtype=np.int64) * CLASSES // count).astype(np.int32)
    names = np.tile(np.frombuffer(NAME.format(0, 0).encode(), dtype=np.uint8), (count, 1))
    _write_digits(names, 6, 4, targets)
    _write_digits(names, 17, 8, np.arange(count))
    return Index(
        root=Path(root),
        classes=tuple(f"class-{i:04d}" for i in range(CLASSES)),
        names=names.reshape(-1),
        offsets=np.arange(count + 1, dtype=np.int64) * width,
        targets=targets,
        sizes=np.full(count, 110_000, dtype=np.int64),
        ignored=0,
        fingerprint="0" * 64,
    )


def _write_digits(names: np.ndarray, at: int, digits: int, numbers: np.ndarray) -> None:
    for place in range(digits):
        names[:, at + digits - 1 - place] = ord("0") + numbers // 10**place % 10


def write_tree(root: Path, count: int) -> Path:
    """Write `count` files of one byte in 1,000 class folders. Complete folders are kept."""
    per_class = max(1, count // CLASSES)
    for c in range(min(CLASSES, count)):
        folder = root / f"class-{c:04d}"
        if folder.is_dir() and len(os.listdir(folder)) == per_class:  # noqa: PTH208
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            (folder / f"image-{i:08d}.jpg").write_bytes(b"x")
    return root
