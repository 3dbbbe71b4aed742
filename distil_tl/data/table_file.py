"""Rows of a table of labels: CSV, TSV or Parquet, some thousands at a time."""

from __future__ import annotations

import codecs
import csv
import importlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from distil_tl.data.split_file import COLUMNS, ENCODING
from distil_tl.utils.errors import UserError

ROWS_AT_ONCE = 65_536
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
PARQUET = (".parquet", ".pq")
OTHERS = (".xlsx", ".xls", ".ods", ".json", ".jsonl", ".gz", ".zip")
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
OWN = ",".join(COLUMNS).encode()  # how a split.csv begins
LONGEST = 1 << 20  # characters of the first line
MOST_LINES = 20  # of a header with line breaks in names


class Chunk(NamedTuple):
    """Some rows: the line in the file where each begins, or its number in a Parquet file, and its cells."""

    lines: list[int]
    rows: list[Sequence[str]]


@dataclass(frozen=True)
class TableFile:
    """A table that can be read once.

    Attributes:
        columns: their names.
        form: what was found out about the file, in words.
        unit: what the numbers of rows are: line or row.
        exact: whether cells mean what they say, as in a split.csv. In other tables, spaces around them are not meant.
        chunks: the rows, in the order of the file. They may have another number of cells than there are columns.
            Raises UserError if the file can't be read on.
    """

    columns: list[str]
    form: str
    unit: str
    exact: bool
    chunks: Iterator[Chunk]


def open_table(path: Path) -> TableFile:
    """The table in a file.

    Raises:
        UserError: it is missing, empty, or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix in OTHERS:
        raise UserError(f"data.labels={path} is neither CSV, TSV nor Parquet: save it as CSV")
    try:
        return _open_parquet(path) if suffix in PARQUET else _open_text(path)
    except OSError as error:
        raise UserError(f"can't read data.labels={path}: {error.strerror or error}") from error


def _open_text(path: Path) -> TableFile:
    encoding, errors = _encoding(path)
    file = path.open(encoding=encoding, errors=errors, newline="")
    try:
        lines, before = _first_lines(path, file)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(lines)
        reader = csv.reader(itertools.chain(lines, file), delimiter=delimiter)
        columns = [cell.strip() for cell in next(reader)]
    except (csv.Error, UnicodeError, UserError, OSError) as error:
        file.close()
        if isinstance(error, (UserError, OSError)):
            raise
        raise UserError(f"can't read the first line of data.labels={path}: {error}; correct the file") from error
    while columns and not columns[-1]:
        columns.pop()  # separators at the end of a line
    words = [f"separated by {DELIMITERS[delimiter]}"] if delimiter != "," else []
    words += ["read as Windows-1252, as it is not UTF-8"] if encoding in ("cp1252", "latin-1") else []
    chunks = _text_chunks(path, file, reader, len(columns), before)
    return TableFile(columns, ", ".join(words), "line", (encoding, errors) == ENCODING, chunks)


def _encoding(path: Path) -> tuple[str, str]:
    """UTF-8 or UTF-16 by the first bytes; UTF-8 if all of the file is; else what Windows uses in Western Europe.

    With the way of handling errors: the names in a split.csv may have bytes that are not UTF-8.
    """
    with path.open("rb") as file:
        beginning = file.read(len(OWN) + 1)
    if beginning.startswith(OWN) and beginning[len(OWN) :] in (b"\n", b","):
        return ENCODING
    if marked := [encoding for mark, encoding in BOMS.items() if beginning.startswith(mark)]:
        return marked[0], "strict"
    for encoding in ("utf-8", "cp1252"):
        try:
            with path.open(encoding=encoding) as text:
                while text.read(1 << 22):
                    pass
            return encoding, "strict"
        except UnicodeDecodeError:
            continue
    return "latin-1", "strict"


def _text_chunks(path: Path, file: TextIO, reader: Any, columns: int, before: int) -> Iterator[Chunk]:
    """The rows that `reader` has left. It began after `before` lines of the file."""
    lines, rows, end = list[int](), list[Sequence[str]](), before + reader.line_num
    with file:
        try:
            for row in reader:
                line, end = end + 1, before + reader.line_num
                if not any(row):
                    continue
                while len(row) > columns and not row[-1].strip():
                    row.pop()
                lines.append(line)
                rows.append(row)
                if len(rows) == ROWS_AT_ONCE:
                    yield Chunk(lines, rows)
                    lines, rows = [], []
        except (csv.Error, UnicodeError, OSError) as error:
            raise UserError(f"can't read data.labels={path} after line {end}: {error}; correct the file") from error
    yield Chunk(lines, rows)


def _first_lines(path: Path, file: TextIO) -> tuple[list[str], int]:
    """The first lines from the header on, and how many lines are before it."""
    before, lines = 0, list[str]()
    while not lines:
        line = file.readline(LONGEST)
        if not line:
            raise UserError(f"data.labels={path} is empty: its first line must name the columns, such as path,label")
        if len(line) == LONGEST or "\0" in line:
            what = "has NUL characters" if "\0" in line else f"has more than {LONGEST:,} characters"
            raise UserError(f"data.labels={path}: the first line {what}, so it is no table; save it as CSV in UTF-8")
        if not line.strip() or re.fullmatch(r'"?sep=.?"?\s*', line, re.IGNORECASE):  # of a spreadsheet
            before += 1
        else:
            lines.append(line)
    while len(lines) < MOST_LINES and "".join(lines).count('"') % 2 and (line := next(file, "")):
        lines.append(line)
    return lines, before


def _delimiter(lines: Sequence[str]) -> str:
    """What separates the cells of a header, which may have line breaks in quotes."""
    text = "".join(lines)
    header = lines[0] if text.count('"') % 2 else text
    return max(DELIMITERS, key=re.sub(r'"[^"]*"', "", header).count)


def _open_parquet(path: Path) -> TableFile:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"data.labels={path} needs pyarrow: pip install 'distil_tl[table]', or save it as CSV"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except OSError:
        raise
    except Exception as error:  # pyarrow's errors have several base classes
        raise UserError(f"data.labels={path} is not a Parquet file, or is damaged: {error}") from error
    return TableFile([str(name) for name in file.schema_arrow.names], "", "row", False, _parquet_chunks(path, file))


def _parquet_chunks(path: Path, file: Any) -> Iterator[Chunk]:
    number = 1
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            columns = [[_text(value) for value in column.to_pylist()] for column in batch.columns]
            yield Chunk(list(range(number, number + batch.num_rows)), list(zip(*columns, strict=True)))
            number += batch.num_rows
    except Exception as error:  # as above
        raise UserError(f"can't read data.labels={path} after row {number - 1}: {error}") from error
    if number == 1:
        yield Chunk([], [])


def _text(value: Any) -> str:
    """A cell as CSV would contain it; empty for what is missing."""
    if value is None or value != value:  # NaN
        return ""
    return value if isinstance(value, str) else value.decode() if isinstance(value, bytes) else str(value)
