"""The index: packed arrays, fingerprints, differences between two scans."""

from __future__ import annotations

import os
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distil_tl.data.index import Index, differences
from distil_tl.data.scan import scan
from tests.helpers.image_folders import assert_as_torchvision, assert_equal, plant


def test_arrays_are_compact(tmp_path: Path):
    index = scan(plant(tmp_path, "a/1.jpg", "b/22.jpg"))
    assert index.names.tobytes() == b"a/1.jpgb/22.jpg"
    assert index.offsets.tolist() == [0, 7, 15]
    assert [a.dtype for a in (index.names, index.offsets, index.targets, index.sizes)] == [
        *(np.uint8, np.int64, np.int32, np.int64)
    ]
    assert all(a.flags.writeable and a.flags.c_contiguous for a in index.to_arrays().values())


def test_names_of_any_bytes(tmp_path: Path):
    plant(tmp_path, "K\u00e4fer/\u732b\n\U0001f600.jpg", "K\u00e4fer/' \"\\.png", "\u7121/\ufffd.jpg")
    (tmp_path / os.fsdecode(b"\xff\xfe")).mkdir()
    (tmp_path / os.fsdecode(b"\xff\xfe/\x80.jpg")).write_bytes(b"xy")
    index = assert_as_torchvision(tmp_path)
    assert all(index.path(i).is_file() for i in range(len(index)))
    assert_equal(Index.from_arrays(index.to_arrays()), index)


def test_access_by_number(tmp_path: Path):
    index = scan(plant(tmp_path, "a/1.jpg", "a/2.jpg"))
    assert index.relative_path(1) == index.relative_path(-1) == "a/2.jpg"
    assert index.path(np.int64(0)) == tmp_path / "a" / "1.jpg"
    with pytest.raises(IndexError):
        index.relative_path(2)


def test_fingerprint_depends_on_content_not_location(tmp_path: Path):
    files = ("a/1.jpg", "a/2.jpg", "b/1.jpg")
    first = scan(plant(tmp_path / "first", *files))
    copy = scan(plant(tmp_path / "copy", *reversed(files), "a/notes.txt"))
    os.utime(tmp_path / "copy" / "a" / "1.jpg", (1, 1))
    assert scan(tmp_path / "copy").fingerprint == first.fingerprint == copy.fingerprint
    assert len(first.fingerprint) == 64
    assert set(first.fingerprint) <= set(string.hexdigits)


def test_fingerprint_depends_on_every_part(tmp_path: Path):
    def changed(*files: str, classes=None, grow: str | None = None) -> str:
        root = plant(tmp_path / str(len(list(tmp_path.iterdir()))), *files)
        if grow:
            (root / grow).write_bytes(b"x" * 99)
        return scan(root, classes).fingerprint

    prints = [
        changed("a/1.jpg", "b/2.jpg"),
        changed("a/1.jpg", "b/3.jpg"),
        changed("a/1.jpg", "b/2.jpg", "b/3.jpg"),
        changed("a/1.jpg", "b/2.jpg", grow="b/2.jpg"),
        changed("a/1.jpg", "b/2.jpg", classes=["b", "a"]),
        changed("a/1.jpg", "b/2.jpg", classes=["a", "b", "c"]),
        changed("a/1.jpg", "b/2.jpg", classes=["a", "b", "d"]),
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_never_changes(tmp_path: Path):
    # Checkpoints contain it. If this test fails, no existing run can be resumed.
    assert scan(plant(tmp_path, "a/1.jpg", "b/\u00e9.jpg")).fingerprint == (
        "198913fb53b5ae526c2df75aabe5e2bf62e809702a030dac970e3d8dc5bf5582"
    )


def test_differences(tmp_path: Path):
    old = scan(plant(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"))
    assert not differences(old, scan(tmp_path))
    assert str(differences(old, old)) == "no difference"
    (tmp_path / "a" / "1.jpg").unlink()
    (tmp_path / "b" / "1.jpg").write_bytes(b"")
    plant(tmp_path, "a/0.jpg", "c/1.jpg")
    found = differences(old, scan(tmp_path))
    assert found
    assert (found.added, found.removed, found.resized) == (("a/0.jpg", "c/1.jpg"), ("a/1.jpg",), ("b/1.jpg",))
    assert str(found) == (
        "2 added ('a/0.jpg', 'c/1.jpg'); 1 removed ('a/1.jpg'); 1 changed in size ('b/1.jpg'); "
        "the list of classes changed"
    )


def test_an_edited_label_is_named_with_both_classes(tmp_path: Path):
    index = scan(plant(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg"))
    edited = replace(index, targets=np.array([0, 1, 1], dtype=np.int32))
    found = differences(index, edited)
    assert found
    assert str(found) == "1 label changed: 'a/2.jpg' was a, now b"
    other = replace(index, classes=("b", "a"), targets=np.array([1, 1, 0], dtype=np.int32))
    assert str(differences(index, other)) == "the list of classes changed", "the labels are the same"


def test_differences_in_classes_alone(tmp_path: Path):
    plant(tmp_path, "a/1.jpg")
    assert str(differences(scan(tmp_path), scan(tmp_path, ["a", "b"]))) == "the list of classes changed"
