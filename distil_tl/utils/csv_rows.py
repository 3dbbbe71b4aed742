"""CSV that holds any file name."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any, TextIO


class CsvWriter:
    """A writer of rows that end in a line feed.

    csv.writer quotes a cell only for its own line end. A carriage return in a name must be quoted as well, because
    readers take it for the end of a row.
    """

    def __init__(self, file: TextIO, delimiter: str = ",") -> None:
        self._plain = csv.writer(file, lineterminator="\n", delimiter=delimiter)
        self._quoted = csv.writer(file, lineterminator="\n", delimiter=delimiter, quoting=csv.QUOTE_ALL)

    def writerow(self, row: Sequence[Any]) -> None:
        odd = any("\r" in str(cell) for cell in row)
        (self._quoted if odd else self._plain).writerow(row)
