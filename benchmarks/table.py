"""Time and memory of reading a table of labels, of its split and of split.csv, without image files.

    python -m benchmarks.table [--rows 10_000_000] [--classes 1000] [--folder FOLDER]

Writes a CSV of made-up images. The system calls that look up each image are replaced by one answer for all of them, so
what a file system needs is not in the figures; all the rest is the code of a run on rank 0. Each line has the CPU time
of a step, and the largest resident memory of the process until its end, less that of its imports.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from distil_tl.data import find_splits, table_paths
from distil_tl.data.config import DataConfig
from distil_tl.data.index import Index
from distil_tl.data.split_file import read_split_file, write_split_file
from distil_tl.data.table import read_table

STATUS = SimpleNamespace(st_mode=0o100644, st_size=120_000, st_mtime_ns=10**18)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="images (default: 10,000,000)")
    parser.add_argument("--classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--folder", type=Path, help="for the table, 50 bytes a row (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_table(Path(folder) / "labels.csv", options.rows, options.classes)
        measure(Path(folder))
    return 0


def write_table(path: Path, rows: int, classes: int) -> None:
    """A table of images in folders of their classes, in no order."""
    with path.open("w", encoding="utf-8") as file:
        file.write("path,label\n")
        for i in range(rows):
            n = i * 7_919 % rows
            file.write(f"photos/class_{n % classes:04d}/image_{n:09d}.jpg,class_{n % classes:04d}\n")


def measure(folder: Path) -> None:
    """Print what reading the table, its split, writing split.csv and reading it take, one after the other."""
    config, kept = DataConfig(root=str(folder), labels=str(folder / "labels.csv")), folder / "split.csv"
    peak = peak_mib()

    def step(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        sys.stdout.write(f"{name:<16} {time.process_time() - began:7.1f} s of CPU {peak_mib() - peak:8.0f} MiB\n")
        sys.stdout.flush()
        return result

    with mock.patch.object(table_paths, "os", SimpleNamespace(stat=lambda path: STATUS, fsencode=os.fsencode)):
        table = step("table", lambda: read_table(config, folder))
    with mock.patch.object(find_splits, "read_table", return_value=table):
        splits: dict[str, Index] = step("split", lambda: find_splits.find_splits(config, folder, most_read=0)[0])
    step("write split.csv", lambda: write_split_file(kept, splits))
    splits.clear()
    step("read split.csv", lambda: read_split_file(kept, table.index))


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
