"""Tables of labels as people, spreadsheets and damaged disks leave them, and what must come out of them."""

from __future__ import annotations

import csv
import importlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# Below the root; each file has other content. None has spaces around its name, which tables can't say.
IMAGES = (
    "a/x.jpg", "a/y.jpg", "a/z.JPG", "a-b/x.jpg", "a/deep/er/z.png", "b/ä ö.png", "b/x,y;z.jpg", 'c/"q".png',
    "c/it's.png", "c/a\nb.png", "c/tab\there.bmp", "d e/0012.jpg", "d e/nan.png", "d e/=1+1.webp", "猫/💩.png",
    "d e/#.png", "d e/..a.png", "photos/x.jpg", "b/|.png", "b/p%20q.jpg",
)  # fmt: skip
NO_IMAGES = ("a/pipe.jpg", "a/folder.jpg", "a/dangling.jpg", "a/loop.jpg", "a/text.txt", "a/outside.jpg")
LABELS = [
    "cat", "dog", "Cat", "Gänse", "ein Label", "1", "007", "1.0", "nan", "None", "a,b", "a;b", 'say "x"', "x\ny",
    "a\tb", "\x1b[31m", "猫", "e\u0301", "\u202eevil", "💩", "x" * 300, "train", "a/b", "..", "-", "=1+1", "'",
    "\ufeff", "\u2028",
]  # fmt: skip
NAMES = {
    "path": ["path", "Path", "file", "image", "Image Path", "Datei", "filename", "img_path", " path "],
    "label": ["label", "Class", "category", "Klasse", "species", "LABEL"],
    "split": ["split", "Set", "subset"],
    "group": ["group", "Gruppe"],
    "weight": ["weight", "Gewicht"],
}
ODD_COLUMNS = ["", " ", "Notiz", "a\nb", 'a"b', "\x1b[31m", "猫", "a,b", "patient", "x" * 200, "1", "\ufeff", "nan"]
SPLIT_CELLS = ["train", "val", "test", "valid", "Training", " dev ", "TEST"]
STYLES = ("plain", "backslashes", "dots", "absolute", "windows", "unix", "above")
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252")


def build(root: Path) -> None:
    """The images, and what is none."""
    for number, name in enumerate(IMAGES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number * (number // 3 + 1))
    (root.parent / "outside.jpg").write_bytes(b"x")
    (root / "a/folder.jpg").mkdir()
    (root / "a/text.txt").write_text("text")
    os.mkfifo(root / "a/pipe.jpg")
    for link, target in {"dangling": "nowhere.jpg", "loop": "loop.jpg"}.items():
        (root / f"a/{link}.jpg").symlink_to(target)


@dataclass
class Row:
    """A row: the image that its path means, its label, its other cells, and whether it must be refused."""

    image: str
    label: str
    cells: dict[str, str]
    wrong: bool


@dataclass
class Table:
    """A table.

    Attributes:
        content: of its file.
        suffix: of its name.
        has_split: whether a column has the splits.
        rows: what is in it; None if the file was damaged, so that anything may come out.
        lines: on which each row begins.
        config: of the section `data`.
    """

    content: bytes
    suffix: str
    has_split: bool
    rows: list[Row] | None
    lines: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def written(image: str, style: str, root: Path) -> str:
    """The path of an image as a table may have it."""
    return {
        "plain": image, "backslashes": image.replace("/", "\\"), "dots": f"./a/../{image}",
        "absolute": f"{root}/{image}",
        "windows": f"C:\\Users\\anna\\{image}".replace("/", "\\"), "unix": f"/home/anna/my photos/{image}",
        "above": f"{root.name}/{image}",
    }[style]  # fmt: skip


@st.composite
def rows(draw: st.DrawFn, kinds: list[str]) -> list[Row]:
    labels = draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=4, unique=True))
    found = []
    for image in draw(st.lists(st.sampled_from(IMAGES), min_size=1, max_size=14, unique=True)):
        cells = {
            "split": draw(st.sampled_from(SPLIT_CELLS)),
            "group": draw(st.sampled_from(["1", "2", "x y", "猫"])),
            "weight": draw(st.sampled_from(["1", "0.5", "2", "1e-3", "0"])),
        }
        label = draw(st.sampled_from(labels))
        found.append(Row(image, label, {kind: cells[kind] for kind in kinds}, not label.strip()))
    return found


def spoil(draw: st.DrawFn, found: list[Row], kinds: list[str]) -> None:
    """Make a row wrong in one way."""
    row = draw(st.sampled_from(found))
    if row.wrong or sum(other.image == row.image for other in found) > 1:
        return
    ways = ["lost", "no image", "label", "twice", "twice", "nul", *kinds]
    how = draw(st.sampled_from(ways))
    if how in ("lost", "no image"):
        lost = ["nowhere.jpg", "../outside.jpg", "a/../../outside.jpg", "", " ", ".", "..", "/", "a", "nowhere",
                "x" * 300 + ".jpg", "x/" * 3000 + "y.jpg", "a/x.jpg/y.jpg", "\\\\srv\\x.jpg", "~/x.jpg"]  # fmt: skip
        row.image = draw(st.sampled_from(lost if how == "lost" else list(NO_IMAGES)))
    elif how == "twice":
        other = draw(st.sampled_from(LABELS))
        found.append(Row(row.image, draw(st.sampled_from([row.label, other])), dict(row.cells), True))
        return
    elif how == "label":
        row.label = draw(st.sampled_from(["", "  ", "\t"]))
    elif how == "nul":
        row.label += "\0x"
    else:
        wrong = {
            "split": ["", "trian", "0"],
            "group": ["", " "],
            "weight": ["", "x", "-1", "nan", "inf", "1e300", "1,0,0"],
        }
        row.cells[how] = draw(st.sampled_from(wrong[how]))
    row.wrong = True


def unambiguous(row: Row, style: str) -> bool:
    """Whether a path is found again: a prefix is cut off where a shorter path is an image, too."""
    return style in ("plain", "dots", "absolute") or (
        not row.image.startswith(("photos/", "/")) and "\\" not in row.image
    )


@st.composite
def tables(draw: st.DrawFn, root: Path) -> Table:
    kinds = [kind for kind in ("split", "group", "weight") if draw(st.integers(0, 3)) == 0]
    found = draw(rows(kinds))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        spoil(draw, found, kinds)
    style = draw(st.sampled_from(STYLES))
    names = {kind: draw(st.sampled_from(NAMES[kind])) for kind in ("path", "label", *kinds)}
    more = draw(st.lists(st.sampled_from(ODD_COLUMNS), max_size=3, unique=True))
    order = draw(st.permutations([*names, *more]))
    extra = draw(st.sampled_from(["", "x", "a\nb", "1,5", 'a "b"', "x" * 1000, "猫", " "]))
    header = [names.get(column, column) for column in order]
    lines = [
        [
            written(row.image, style, root) if column == "path" else row.label if column == "label"
            else row.cells[column] if column in kinds else extra
            for column in order
        ]
        for row in found
    ]  # fmt: skip
    config: dict[str, Any] = {}
    if draw(st.integers(0, 5)) == 0:
        config["columns"] = {kind: names[kind].strip() for kind in ("path", "label") if kind in names}
    if draw(st.integers(0, 5)) == 0:
        config["split"] = {"seed": draw(st.integers(-5, 5)), "val": draw(st.sampled_from([0.1, 0.5, 0.9]))}
    # More separators at the end of each line than cells are no columns; an empty name in the middle is one.
    table = Table(b"", "", "split" in kinds, found, config=config)
    known = all(unambiguous(row, style) for row in found) and header[-1].strip() != ""
    if draw(st.integers(0, 6)) == 0:
        _as_parquet(table, header, lines)
    else:
        _as_text(draw, table, header, lines)
    known = known and all(any(cell for cell in line) for line in lines)  # others are skipped
    known = known and not (table.suffix == ".parquet" and "columns" in config)  # whose names are not stripped
    if not known or len({name.strip() for name in header}) < len(header):
        table.rows = None
    return table


def _as_parquet(table: Table, header: list[str], lines: list[list[str]]) -> None:
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    file = io.BytesIO()
    columns = [pyarrow.array(column) for column in zip(*lines, strict=True)]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=header), file)
    table.content, table.suffix = file.getvalue(), ".parquet"
    table.lines = list(range(1, len(lines) + 1))


def _as_text(draw: st.DrawFn, table: Table, header: list[str], lines: list[list[str]]) -> None:
    separator = draw(st.sampled_from(",;\t|"))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    quoting: Any = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    text = io.StringIO(newline="")
    begin = draw(st.sampled_from(["", "", "", "\n", f"sep={separator}{end}"]))
    text.write(begin)
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting)
    if quoting == csv.QUOTE_MINIMAL and any("\r" in cell for row in lines for cell in row):
        table.rows = None
    writer.writerow(header)
    blank = draw(st.booleans())
    for row in lines:
        table.lines.append(len(_physical(text.getvalue())) + 1)
        writer.writerow(row)
        if blank:
            text.write(end)
    table.suffix = draw(st.sampled_from([".tsv"] if separator == "\t" else [".csv", ".txt", "", ".CSV"]))
    encoding = draw(st.sampled_from(ENCODINGS))
    try:
        table.content = text.getvalue().encode(encoding)
    except UnicodeEncodeError:
        encoding = "utf-8"
        table.content = text.getvalue().encode()
    if encoding == "cp1252" and "\ufeff" in text.getvalue():
        table.rows = None
    _damage(draw, table, separator, end)


def _physical(text: str) -> list[str]:
    """The lines of a text that is read with all kinds of line ends."""
    return io.StringIO(text, newline="").readlines()


def _damage(draw: st.DrawFn, table: Table, separator: str, end: str) -> None:
    how = draw(st.integers(0, 13))
    content = table.content
    at = draw(st.integers(0, len(content)))
    damaged = {
        0: content[:at],
        1: content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at:],
        2: content[:at] + draw(st.sampled_from([b'"', b"\0", b"\r", b"\n", b",", b";", b"\xff"])) + content[at:],
        3: content + b"x" * 140_000 + end.encode(),
        4: b"x" * 140_000 + content,
        5: content + f"a{separator}b{separator}c{separator}d{separator}e{separator}f{separator}g{end}".encode(),
        6: content[:at] + content[draw(st.integers(at, len(content))) :],
    }
    if how == 7:
        table.suffix = draw(st.sampled_from([".parquet", ".tsv", ".pq", ".xlsx", ".csv", ".jpg", ".json"]))
        table.rows = None
    elif how in damaged:
        table.content, table.rows = damaged[how], None
