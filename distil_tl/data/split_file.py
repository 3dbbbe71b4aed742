"""split.csv: which image is in which split. A run keeps it where the split was made for it, and holds to it."""

from __future__ import annotations

import csv
import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distil_tl.data.config import SPLITS
from distil_tl.data.index import Array, Index
from distil_tl.data.split import keyed_order, path_key
from distil_tl.utils.csv_rows import CsvWriter
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import open_regular, write_parts

COLUMNS = ["path", "label", "split", "bytes"]
WEIGHT = "weight"  # a column more, where the images have weights
ROWS_AT_ONCE = 65_536
ENCODING = ("utf-8", "surrogateescape")  # a file name that is not UTF-8 keeps its bytes


class Held(NamedTuple):
    """What split.csv says of the images of an index.

    Attributes:
        codes: uint8 [N], positions in SPLITS; train for images that it does not list.
        same: bool [N], whether it lists the path with the same size.
        relabelled: the label that it lists, of each image that has another one now.
    """

    codes: Array
    same: Array
    relabelled: dict[int, str]


def write_split_file(path: Path, splits: Mapping[str, Index]) -> None:
    """Write the images of all splits, in the order of their indexes. Raises OSError."""
    write_parts(path, _parts(splits))


def _parts(splits: Mapping[str, Index]) -> Iterator[bytes]:
    text = io.StringIO()
    writer = CsvWriter(text)
    weighted = any(index.weights is not None for index in splits.values())
    writer.writerow([*COLUMNS, WEIGHT] if weighted else COLUMNS)
    for split, index in splits.items():
        for i, name in enumerate(index.relative_paths()):
            weight = [] if index.weights is None else [float(index.weights[i])]
            label, size = index.classes[index.targets[i]], int(index.sizes[i])
            writer.writerow([os.fsdecode(name), label, split, size, *weight])
            if i % ROWS_AT_ONCE == 0:
                yield text.getvalue().encode(*ENCODING)
                text.seek(0)
                text.truncate()
    yield text.getvalue().encode(*ENCODING)


def read_split_file(path: Path, index: Index) -> Held:
    """The split of each image of `index` by the file `path`. Uses 20 bytes of memory for each row.

    Raises:
        UserError: the file is missing or damaged.
    """
    order = keyed_order(index, 0)
    by_key, position = np.argsort(order), index.class_to_idx
    found = Held(np.zeros(len(index), np.uint8), np.zeros(len(index), bool), {})
    try:
        with io.TextIOWrapper(open_regular(path), *ENCODING, newline="") as file:
            for keys, codes, sizes, labels in _chunks(csv.reader(file)):
                at = np.searchsorted(order, keys, sorter=by_key).clip(max=len(index) - 1)
                rows = by_key[at]
                known = order[rows] == keys
                rows = rows[known]
                found.codes[rows] = codes[known]
                found.same[rows] = sizes[known] == index.sizes[rows]
                targets = np.array([position.get(label, -1) for label in labels], np.int64)[known]
                edited = targets != index.targets[rows]
                at = np.flatnonzero(known)[edited]
                found.relabelled.update(zip(rows[edited].tolist(), (labels[i] for i in at.tolist()), strict=True))
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {error}"
        raise UserError(f"{path} {reason}: it says which images are in which split; restore it") from error
    return found


def splits_of(path: Path, root: Path, files: Sequence[Path]) -> list[str | None]:
    """The split of each file, which is named as the user gave it; None for a file that is not listed.

    Args:
        path: of split.csv.
        root: that its paths begin in.

    Raises:
        UserError: split.csv can't be read.
    """
    real_folder = functools.lru_cache(maxsize=None)(os.path.realpath)  # an image itself may be a link to another one

    def place(file: str) -> str:
        return f"{real_folder(os.path.dirname(file))}/{os.path.basename(file)}"  # noqa: PTH119, PTH120

    position = {place(str(file)): i for i, file in enumerate(files)}
    found: list[str | None] = [None] * len(files)
    try:
        with io.TextIOWrapper(open_regular(path), *ENCODING, newline="") as file:
            for row in csv.DictReader(file):
                if (i := position.get(place(f"{root}/{row['path']}"))) is not None:
                    found[i] = row["split"]
    except (OSError, KeyError, csv.Error) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    return found


def _chunks(rows: Iterator[list[str]]) -> Iterator[tuple[Array, Array, Array, list[str]]]:
    """Keys of the paths, codes of the splits, sizes and labels, of some rows at a time. Raises ValueError."""
    if next(rows, None) not in (COLUMNS, [*COLUMNS, WEIGHT]):
        raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    keys, codes, sizes, labels = list[bytes](), list[int](), list[int](), list[str]()
    for name, label, split, size, *_ in rows:
        keys.append(path_key(os.fsencode(name), 0))
        codes.append(SPLITS.index(split))
        sizes.append(int(size))
        labels.append(label)
        if len(keys) == ROWS_AT_ONCE:
            yield *_arrays(keys, codes, sizes), labels
            keys, codes, sizes, labels = [], [], [], []
    yield *_arrays(keys, codes, sizes), labels


def _arrays(keys: list[bytes], codes: list[int], sizes: list[int]) -> tuple[Array, Array, Array]:
    return np.frombuffer(b"".join(keys), dtype="<u8"), np.array(codes, np.uint8), np.array(sizes, np.int64)
