"""Any folder of classes is divided as promised, by any `data.split`, or refused in a sentence."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import strategies as st

from distil_tl.data import walk
from distil_tl.data.config import DataConfig, SplitConfig
from distil_tl.data.find_splits import divided, find_split, find_splits
from distil_tl.data.index import Index
from distil_tl.data.scan import scan
from distil_tl.data.split_file import read_split_file, write_split_file
from distil_tl.utils.errors import UserError
from tests.fuzz.running import End, bounded, explore
from tests.fuzz.test_tables import different
from tests.fuzz.test_trees import fresh

LONG = pytest.mark.fuzz
CLASSES = [
    b"cat",
    b"dog",
    b"a b",
    b"-rf",
    b"caf\xe9",
    "猫".encode(),
    b"a,b",
    b'"',
    b"a\nb",
    b" x ",
    b"1",
    b"nan",
    b"x" * 255,
]
ENDS = [
    b".jpg",
    b".png",
    b".JPG",
    b" .jpg",
    b"\n.png",
    b"\r.png",
    b"\xff.jpg",
    b"\\.jpg",
    b",.jpg",
    b'".png',
    b";.webp",
]
PATTERNS = [
    "^[^/]*", "([0-9]+)_", "p[0-3]", "(p)([0-9])", "(x)?p.", ".", "", "$", "(", "[", "nothing", "p(?=.)",
    "(?P<g>p[0-9])", "x{99999999999}", "(?i)P[0-9]", "a|p.", "\\d", "*", "(" * 200, "\\", "p[0-9]/?", "[[a]p|p",
]  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """Files by relative path, with their contents, and the split that is asked for."""

    files: dict[bytes, bytes]
    split: SplitConfig


@st.composite
def folders(draw: st.DrawFn) -> Folder:
    files: dict[bytes, bytes] = {}
    copies = draw(st.sampled_from([1, 3, 30]))  # contents: many twins, some, or hardly any
    for name in draw(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=4, unique=True)):
        for number in range(draw(st.sampled_from([1, 2, 5, 8, 12, 20]))):
            patient = b"p%d" % draw(st.integers(0, 4))
            inside = draw(st.sampled_from([b"", b"", patient + b"/", b"deep/er/"]))
            path = name + b"/" + inside + patient + b"_%d" % number + draw(st.sampled_from(ENDS))
            twin = draw(st.integers(0, 9)) < (8 if copies == 1 else 3 if copies == 3 else 0)
            files[path] = b"twin %d" % draw(st.integers(0, copies)) if twin else b"own of " + path
            if draw(st.integers(0, 40)) == 0:
                files[path] = b""
    odd = [0.1, 0.34, 0.9, 0.999, 1e-9, 0.0, 1.0, -0.1, float("nan"), float("inf")]
    shares = st.sampled_from([0.2, 0.3, 0.5, 0.25, 0.4, 0.6] * 3 + odd)
    group = draw(st.sampled_from([None, None, None, *PATTERNS[1:6], draw(st.sampled_from(PATTERNS))]))
    seed = draw(st.sampled_from([0, 1, -1, 2**63, -(2**70), 12345]))
    test = draw(st.sampled_from([0.0, 0.0, 0.2, draw(shares)]))
    return Folder(files, SplitConfig(draw(shares), test, group, seed))


def write(root: Path, files: dict[bytes, bytes]) -> None:
    for name, content in files.items():
        path = os.path.join(os.fsencode(root), name)  # noqa: PTH118 - bytes
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - bytes
        with open(path, "wb") as file:  # noqa: PTH123 - bytes
            file.write(content)


def broken_promise(folder: Folder, splits: dict[str, Index]) -> str:
    """Which promise a split breaks; empty if none."""
    where: dict[bytes, str] = {}
    for split, index in splits.items():
        for path in index.relative_paths():
            if path in where:
                return f"{path!r} is in {where[path]} and in {split}"
            where[path] = split
    if where.keys() != folder.files.keys():
        return f"lost or new: {where.keys() ^ folder.files.keys()}"
    together: dict[Any, str] = {}
    for path, content in folder.files.items():
        of: list[Any] = [("content", content)] if content else []
        if folder.split.group is not None:
            match = re.search(folder.split.group, os.fsdecode(path))
            assert match is not None
            of.append(("group", match.groups() or match[0]))
        for key in of:
            if together.setdefault(key, where[path]) != where[path]:
                return f"{key} is in {together[key]} and in {where[path]}"
    train = splits["train"]
    if (train.class_counts == 0).any():
        return f"train has no image of {train.missing}"
    for split, share in (("val", folder.split.val), ("test", folder.split.test)):
        if (share > 0) != (split in splits) or (split in splits and not len(splits[split])):
            return f"{split} has no images, or should have none"
    return "" if len(together) < len(folder.files) or folder.split.group else wrong_shares(folder, splits)


def wrong_shares(folder: Folder, splits: dict[str, Index]) -> str:
    """Which share of a class is not as asked, where nothing has to stay together."""
    totals = np.sum([index.class_counts for index in splits.values()], axis=0).tolist()
    val = [min(int(n * folder.split.val + 0.5), n - 1) for n in totals]
    test = [min(int(n * folder.split.test + 0.5), n - 1 - v) for n, v in zip(totals, val, strict=True)]
    for split, wanted in (("val", val), ("test", test)):
        if split in splits and splits[split].class_counts.tolist() != wanted:
            return f"{split} has {splits[split].class_counts.tolist()} images, not {wanted}"
    return ""


@pytest.mark.parametrize("examples", [40, pytest.param(10_000, marks=LONG)])
def test_a_split(examples: int, tmp_path: Path) -> None:
    plain, shuffle = walk.entries, random.Random(0)

    def shuffled(folder: str) -> Iterator[os.DirEntry[str]]:
        found = list(plain(folder))
        shuffle.shuffle(found)
        return iter(found)

    def body(folder: Folder) -> tuple[End, str, object]:
        with fresh(tmp_path / "x") as place:
            root, kept = place / "photos", place / "run" / "split.csv"
            write(root, folder.files)
            kept.parent.mkdir()
            config = DataConfig(root=str(root), split=folder.split)
            if config.problems():
                return End(2, "", ""), "", folder
            try:
                with bounded():
                    splits, note = find_splits(config, root)
            except UserError as error:
                return End(2, "", str(error)), "", folder
            fault = broken_promise(folder, splits)
            with mock.patch.object(walk, "entries", shuffled):
                fault = fault or different(find_splits(config, root)[0], splits)
            write_split_file(kept, splits)
            whole = scan(root)
            held = read_split_file(kept, whole)
            fault = fault or different(divided(whole, held.codes), splits)
            fault = fault or ("" if held.same.all() and not held.relabelled else "split.csv is not of these images")
            other = DataConfig(root=str(root), split=SplitConfig(val=0.7))
            fault = fault or different(find_splits(other, root, kept.parent)[0], splits)
            fault = fault or different(find_splits(DataConfig(str(root), str(kept)), root)[0], splits)
            for split, index in splits.items():
                part = find_split(config, root, split, whole.classes, kept.parent)
                fault = fault or ("" if part.fingerprint == index.fingerprint else f"another {split} in an evaluation")
            return End(0, note, ""), fault, folder

    explore(folders(), examples, body)
