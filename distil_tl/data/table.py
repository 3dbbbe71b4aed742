"""The images that a table names: their paths, labels, and optionally splits and groups.

The index is that of a folder with these images: its order and fingerprint depend on the paths and labels, not on the
order of the rows. Rows that can't be used are refused, all together, each by its line.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distil_tl.data.config import SPLITS, USUAL_SPLITS, DataConfig
from distil_tl.data.index import Array, Index, fingerprint_of, gathered, quoted
from distil_tl.data.split import path_key
from distil_tl.data.table_columns import Columns, choose_columns
from distil_tl.data.table_file import Chunk, TableFile, open_table
from distil_tl.data.table_order import folder_order
from distil_tl.data.table_paths import NO_FILE, ImagePaths, Missing, find_paths
from distil_tl.utils.errors import UserError, did_you_mean, listed
from distil_tl.utils.log import logger, printable

THREADS = 16  # files looked at in parallel, to hide the latency of a network file system
PER_TASK = 256  # files
MOST_LISTED = 20  # rows that can't be used
MISSING_VALUES = ("nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nil", "-", "?")  # in lower case
MOST_TRIED = 100  # rows, of which the first with an image says how the paths are written
LARGEST_WEIGHT = 3e38  # that a float32 holds
MOST_COUNTED = 10_000  # such rows until the rest is not read any more


@dataclass(frozen=True)
class Table:
    """The images of a table.

    Attributes:
        index: of all images.
        splits: uint8 [N], positions in SPLITS; None if no column says so.
        groups: int64 [N]; None if there is no such column.
        note: what was found in the table, in words.
    """

    index: Index
    splits: Array | None
    groups: Array | None
    note: str


def read_table(config: DataConfig, root: Path, classes: Sequence[str] | None = None) -> Table:
    """The images of the table `config.labels`, whose paths begin in `root`.

    Args:
        classes: class names, which decide the targets; None: the labels, sorted.

    Raises:
        UserError: the table can't be read, its columns can't be told, or some rows can't be used.
    """
    assert config.labels is not None
    file = open_table(Path(config.labels))
    chunks = file.chunks
    first = next(chunks)
    if not first.rows:
        raise UserError(f"data.labels={config.labels} has no rows")
    columns = choose_columns(file.columns, first.rows[0], config)
    paths = ImagePaths(root, config.image_extensions, exact=True)
    if not file.exact:
        tried = [row[columns.path] for row in first.rows[:MOST_TRIED] if len(row) > columns.path]
        paths = find_paths(tried, root, config)
    rows = _Rows(file, columns, paths)
    with ThreadPoolExecutor(THREADS) as pool:
        rows.add(first, pool)
        for chunk in chunks:
            if rows.wrong_count >= MOST_COUNTED:
                break
            rows.add(chunk, pool)
    rows.refuse_wrong(config.labels)
    _warn_of_missing_values(config.labels, rows)
    notes = [note for note in (file.form, *columns.notes, *paths.notes, *_similar_labels(rows.labels)) if note]
    return _in_order(rows, root, classes, f"{config.labels}: {'; '.join(notes)}")


@dataclass
class _Rows:
    """The rows that were read, in packed arrays."""

    file: TableFile
    columns: Columns
    paths: ImagePaths
    names: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    times: array[int] = field(default_factory=lambda: array("q"))
    targets: array[int] = field(default_factory=lambda: array("i"))
    splits: array[int] = field(default_factory=lambda: array("B"))
    groups: array[int] = field(default_factory=lambda: array("q"))
    weights: array[float] = field(default_factory=lambda: array("f"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    keys: bytearray = field(default_factory=bytearray)  # of the paths, 8 bytes each
    labels: dict[str, int] = field(default_factory=dict)
    wrong: list[tuple[int, str]] = field(default_factory=list)  # the first ones, by line
    wrong_count: int = 0

    def add(self, chunk: Chunk, pool: ThreadPoolExecutor) -> None:
        """Read some rows. What is wrong with them is kept for `refuse_wrong`."""
        width = len(self.file.columns)
        good = [(line, row) for line, row in zip(chunk.lines, chunk.rows, strict=True) if len(row) == width]
        if len(good) < len(chunk.rows):
            for line, row in zip(chunk.lines, chunk.rows, strict=True):
                if len(row) != width:
                    self._refuse(line, f"{len(row)} cells instead of {width}")
        cells = [row[self.columns.path] for _, row in good]
        some = [cells[i : i + PER_TASK] for i in range(0, len(cells), PER_TASK)]
        found = itertools.chain.from_iterable(pool.map(self.paths.find_all, some))
        for (line, row), image in zip(good, found, strict=True):
            label = row[self.columns.label] if self.file.exact else row[self.columns.label].strip()
            split = self._split_of(row)
            group = 0 if self.columns.group is None else _group_key(row[self.columns.group])
            problem = image.reason if isinstance(image, Missing) else "the label is empty" if not label else None
            if "\0" in label:
                problem = problem or "the label has a NUL character"
            if split is None:
                problem = problem or f"the split {row[self.columns.split or 0]!r} is not train, val or test"
            if group is None:
                problem = problem or "the group is empty"
            weight = self._weight_of(row)
            if weight is None:
                cell = row[self.columns.weight or 0]
                problem = problem or f"the weight {cell!r} is not a number from 0 to {LARGEST_WEIGHT:g}"
            if isinstance(image, Missing) or problem is not None or split is None or group is None or weight is None:
                self._refuse(line, problem or "")
                continue
            self.names += image.name
            self.lengths.append(len(image.name))
            self.sizes.append(image.size)
            self.times.append(image.time)
            self.targets.append(self.labels.setdefault(label, len(self.labels)))
            self.splits.append(split)
            self.groups.append(group)
            self.weights.append(weight)
            self.lines.append(line)
            self.keys += path_key(image.name, 0)

    def _split_of(self, row: Sequence[str]) -> int | None:
        """The position in SPLITS; None if the cell names no split."""
        if self.columns.split is None:
            return 0
        name = USUAL_SPLITS.get(row[self.columns.split].strip().lower())
        return None if name is None else SPLITS.index(name)

    def _weight_of(self, row: Sequence[str]) -> float | None:
        """The weight, with a decimal point or comma; None if the cell has none."""
        if self.columns.weight is None:
            return 1.0
        try:
            weight = float(row[self.columns.weight].replace(",", "."))
        except ValueError:
            return None
        return weight if 0 <= weight <= LARGEST_WEIGHT else None

    def _refuse(self, line: int, problem: str) -> None:
        self.wrong_count += 1
        bisect.insort(self.wrong, (line, problem))
        del self.wrong[MOST_LISTED:]

    def refuse_wrong(self, table: str) -> None:
        """Raise UserError with all rows that can't be used, if there are any."""
        keys: Array = np.frombuffer(self.keys, dtype="<u8")
        order = np.argsort(keys, kind="stable")
        for i in np.flatnonzero(keys[order[1:]] == keys[order[:-1]]).tolist():
            one, two = int(order[i]), int(order[i + 1])
            same = self.targets[one] == self.targets[two]
            labels = "" if same else ", with another label: an image has one label"
            self._refuse(self.lines[two], f"the same image as in {self.file.unit} {self.lines[one]}{labels}")
        if not self.wrong_count:
            self.keys, self.lines = bytearray(), array("q")  # no longer needed
            return
        more = self.wrong_count - len(self.wrong)
        at_least = "at least " if self.wrong_count >= MOST_COUNTED else ""
        if self.wrong_count > 1 and not self.names and all(problem.startswith(NO_FILE) for _, problem in self.wrong):
            count = f"the first {self.wrong_count:,}" if at_least else f"its {self.wrong_count:,}"
            line, problem = self.wrong[0]
            raise UserError(
                f"data.labels={table}: none of {count} images exists, such as {problem.removeprefix(NO_FILE)} in "
                f"{self.file.unit} {line}; give the folder in which the paths begin: data.root=FOLDER"
                f"{self.paths.advice()}"
            )
        lines = "".join(f"\n  - {self.file.unit} {line}: {problem}" for line, problem in self.wrong)
        raise UserError(
            f"data.labels={table} has {at_least}{self.wrong_count:,} rows that can't be used; correct or remove them:"
            f"{lines}{f'{chr(10)}  and {more:,} more' if more else ''}{self.paths.advice()}"
        )


def _group_key(cell: str) -> int | None:
    """A number for a group, by its name; None if it has none."""
    name = cell.strip().encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True) if name else None


def _similar_labels(labels: dict[str, int]) -> list[str]:
    """A note for labels that differ only in case."""
    by_case: dict[str, list[str]] = {}
    for label in labels:
        by_case.setdefault(label.casefold(), []).append(label)
    twins = [" and ".join(map(repr, names)) for names in by_case.values() if len(names) > 1]
    return [f"different classes: {listed(twins, 3)}"] if twins else []


def _warn_of_missing_values(table: str, rows: _Rows) -> None:
    """Say which labels are what programs write for a missing value. They stay classes: `None` can be one."""
    suspects = {label: code for label, code in rows.labels.items() if label.casefold() in MISSING_VALUES}
    if suspects:
        counts = np.bincount(np.frombuffer(rows.targets, dtype=np.int32))
        said = [f"{quoted(label)} of {counts[code]:,} images" for label, code in suspects.items()]
        logger.warning(
            "data.labels=%s: labels that look like missing values, and are classes here: %s; if they are none, remove "
            "these rows",
            printable(table), listed(said, 8),
        )  # fmt: skip


def _in_order(rows: _Rows, root: Path, classes: Sequence[str] | None, note: str) -> Table:
    """The table with its images in the order of an image folder: by class, folder and name."""
    known = tuple(sorted(rows.labels)) if classes is None else tuple(classes)
    position = {name: target for target, name in enumerate(known)}
    if unknown := [quoted(name) + did_you_mean(name, known) for name in rows.labels if name not in position]:
        raise UserError(f"labels that the training images do not have: {listed(unknown, 8)}; correct the table")
    code = np.array([position[name] for name in rows.labels], dtype=np.int32)
    targets = code[np.frombuffer(rows.targets, dtype=np.int32)]
    names = np.frombuffer(rows.names, dtype=np.uint8)
    lengths = np.frombuffer(rows.lengths, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
    order = folder_order(names, offsets, targets)
    names = gathered(names, offsets, order)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), lengths[order].cumsum()])
    targets, sizes = targets[order], np.frombuffer(rows.sizes, dtype=np.int64)[order]
    times = np.frombuffer(rows.times, dtype=np.int64)[order]
    index = Index(
        root=root,
        classes=known,
        names=names,
        offsets=offsets,
        targets=targets,
        sizes=sizes,
        ignored=0,
        fingerprint=fingerprint_of(known, names, offsets, targets, sizes),
        times=hashlib.sha256(times.astype("<i8").tobytes()).hexdigest(),
    )
    if rows.columns.weight is not None:
        index = index.weighted(np.frombuffer(rows.weights, dtype=np.float32)[order])
    splits = None if rows.columns.split is None else np.frombuffer(rows.splits, dtype=np.uint8)[order]
    groups = None if rows.columns.group is None else np.frombuffer(rows.groups, dtype=np.int64)[order]
    return Table(index, splits, groups, note)
