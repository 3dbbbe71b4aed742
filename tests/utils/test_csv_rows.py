"""CSV rows with any names."""

from __future__ import annotations

import csv
import io

from distil_tl.utils.csv_rows import CsvWriter


def test_every_name_is_read_back() -> None:
    rows = [["a\rb.jpg", "1"], ["a\nb", ""], ['"', ","], ["\r", "\n"], ["plain.jpg", "cat"], ["caf\udce9", " "]]
    text = io.StringIO(newline="")
    for row in rows:
        CsvWriter(text).writerow(row)
    assert list(csv.reader(io.StringIO(text.getvalue(), newline=""))) == rows
    assert "\nplain.jpg,cat\n" in text.getvalue(), "only what must be quoted is"
