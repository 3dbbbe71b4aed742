"""Any table of labels: used as it says, or refused in a sentence with the lines that are wrong; nothing is changed."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from pathlib import Path

import pytest

from distil_tl.cli import prepare
from distil_tl.data.config import ColumnsConfig, DataConfig, SplitConfig
from distil_tl.data.find_splits import find_splits
from distil_tl.data.index import Index
from distil_tl.data.table import read_table
from distil_tl.utils.errors import UserError
from tests.fuzz.running import End, bounded, explore, fault_of, run_main, snapshot
from tests.fuzz.tables import Table, build, tables
from tests.fuzz.test_trees import fresh
from tests.helpers.image_folders import assert_equal

LONG = pytest.mark.fuzz
COUNT = re.compile(r"has (?:at least )?([\d,]+) rows that can't be used")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("x") / "my photos"
    build(found)
    return found


def as_expected(table: Table, rows: dict[str, str] | None, message: str) -> str:
    """What is wrong with the images and labels that were read (None: none), or with the message."""
    if table.rows is None:
        return ""
    wrong = [line for line, row in zip(table.lines, table.rows, strict=True) if row.wrong]
    if rows is not None:
        expected = {row.image: row.label.strip() for row in table.rows}
        same = {unicodedata.normalize("NFC", key): value for key, value in rows.items()} == expected
        return f"rows {wrong} are wrong" if wrong else "" if same else f"{rows}\n  instead of\n{expected}"
    count = COUNT.search(message)
    if count is None:
        return "" if wrong or not message else f"refused: {message}"
    if int(count[1]) != len(wrong):
        return f"{len(wrong)} rows are wrong, on lines {wrong}: {message}"
    named = [int(number) for number in re.findall(r"^  - (?:line|row) (\d+):", message, re.MULTILINE)]
    return "" if named == wrong[:20] else f"lines {wrong} are wrong: {message}"


def different(first: dict[str, Index], second: dict[str, Index]) -> str:
    """How two splits differ; empty if they do not."""
    try:
        assert first.keys() == second.keys()
        for split in first:
            assert_equal(first[split], second[split])
    except AssertionError as error:
        return f"another split: {error}"
    return ""


@pytest.mark.parametrize("examples", [60, pytest.param(10_000, marks=LONG)])
def test_a_table(examples: int, root: Path) -> None:
    file = root.parent / "labels"
    before = snapshot(root)

    def body(table: Table) -> tuple[End, str, object]:
        path = file.with_name(f"labels{table.suffix}")
        path.write_bytes(table.content)
        config = DataConfig(
            root=str(root), labels=str(path), columns=ColumnsConfig(**table.config.get("columns", {})),
            split=SplitConfig(**table.config.get("split", {})),
        )  # fmt: skip
        rows, message = None, ""
        try:
            with bounded():
                index = read_table(config, root).index
                paths = map(os.fsdecode, index.relative_paths())
                rows = {p: index.classes[t] for p, t in zip(paths, index.targets.tolist(), strict=True)}
        except UserError as error:
            message = str(error)
        fault = as_expected(table, rows, message)
        fault = fault or ("changed" if path.read_bytes() != table.content or snapshot(root) != before else "")
        path.unlink()
        return End(2 if message else 0, "", message), fault, (table, message)

    explore(tables(root), examples, body)


@pytest.mark.parametrize("examples", [15, pytest.param(3_000, marks=LONG)])
def test_prepare(examples: int, root: Path, tmp_path: Path) -> None:
    """The table that `prepare` writes has the images of the first one, and is read as the same split."""
    before = snapshot(root)

    def body(table: Table) -> tuple[End, str, object]:
        with fresh(tmp_path / "x") as place:
            path, out = place / f"labels{table.suffix}", place / "split.csv"
            path.write_bytes(table.content)
            args = [str(root), f"--labels={path}", f"--out={out}", "--no-duplicates", "--workers=0"]
            args += [] if table.has_split else ["--val=0.4"]
            end = run_main(prepare.main, args)
            fault = fault_of(end) or ("changed" if path.read_bytes() != table.content else "")
            fault = fault or ("changed" if snapshot(root) != before else "")
            if not fault and end.status == 0:
                text = out.read_text(encoding="utf-8", errors="surrogateescape")
                written = list(csv.DictReader(io.StringIO(text, newline="")))
                fault = as_expected(table, {row["path"]: row["label"] for row in written}, "")
                config = DataConfig(str(root), str(path), split=SplitConfig(val=0.2 if table.has_split else 0.4))
                fault = fault or different(
                    find_splits(config, root)[0], find_splits(DataConfig(str(root), str(out)), root)[0]
                )
            elif not fault and out.exists():
                fault = "refused, but there is an output"
            return end, fault, (table, end.err[-300:])

    explore(tables(root), examples, body)


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "dangling link", "loop", "closed"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_is_no_file(kind: str, suffix: str, root: Path, tmp_path: Path) -> None:
    path = tmp_path / f"labels{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o140600)
    elif kind == "closed":
        path.write_text("path,label\n")
        path.chmod(0)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling link": "nowhere", "loop": path.name}[kind])
    end = run_main(prepare.main, [str(root), f"--labels={path}", f"--out={tmp_path / 'out.csv'}", "--workers=0"])
    assert fault_of(end) == ""
    assert end.status == 2, end
    assert not (tmp_path / "out.csv").exists()
