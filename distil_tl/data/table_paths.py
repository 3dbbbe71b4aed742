"""The image that a path in a table means, which may have been written on another machine or under another system."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from distil_tl.data.config import ALL_EXTENSIONS, DataConfig
from distil_tl.data.index import quoted

MOST_FOLDERS = 500  # below data.root, in which a missing image is looked for
NO_FILE = "there is no file "
DRIVE = re.compile(r"[A-Za-z]:/")


class FoundImage(NamedTuple):
    """A file: its path below data.root, as bytes, its size, and its modification time in nanoseconds."""

    name: bytes
    size: int
    time: int


class Missing(NamedTuple):
    """Why a path means no image."""

    reason: str


@dataclass
class ImagePaths:
    """How the paths of a table are read.

    Attributes:
        root: that they begin in.
        extensions: how the names of images end, in lower case.
        prefix: what is cut off: the folder on the machine where the table was written.
        suffix: the extension that the paths lack.
        notes: the same, in words.
        exact: whether cells are the paths, as in a split.csv, which needs no rules.
    """

    root: Path
    extensions: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""
    notes: list[str] = field(default_factory=list)
    exact: bool = False
    lost: str = ""  # the first path without a file

    def find(self, cell: str) -> FoundImage | Missing:
        """The image that a cell names. Thread-safe."""
        text = cell if self.exact else cell.strip().replace("\\", "/")
        if not text:
            return Missing("the path is empty")
        if self.prefix and text.startswith(self.prefix):
            text = text[len(self.prefix) :]
        text = _below(text, self.root)
        name = posixpath.normpath(text + self.suffix)
        if name.startswith(("/", "../")) or DRIVE.match(name):
            return Missing(f"{quoted(cell)} is outside {self.root}; set data.root to a folder that holds all images")
        if not name.lower().endswith(self.extensions):
            more = " (see data.extensions)" if name.lower().endswith(ALL_EXTENSIONS) else ""
            return Missing(f"{quoted(cell)} does not end as the name of an image{more}")
        problem = ""
        for form in _forms(name):
            try:
                status = os.stat(f"{self.root}/{form}")  # noqa: PTH116  # faster, for millions of files
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or str(error)
                continue
            if not stat.S_ISREG(status.st_mode):
                return Missing(f"{quoted(cell)} is not a regular file")
            return FoundImage(os.fsencode(form), status.st_size, status.st_mtime_ns)
        self.lost = self.lost or name
        return Missing(f"{quoted(cell)}: {problem}" if problem else f"{NO_FILE}{quoted(self.root / name)}")

    def find_all(self, cells: Sequence[str]) -> list[FoundImage | Missing]:
        """The images that some cells name. Thread-safe."""
        return [self.find(cell) for cell in cells]

    def advice(self) -> str:
        """Where the first missing image is, if it is in a folder below `root`; for the end of a message."""
        if not self.lost:
            return ""
        name, same_name = posixpath.basename(self.lost), ""
        with suppress(OSError):  # a path that is too long
            for folder, below, files in itertools.islice(os.walk(self.root), MOST_FOLDERS):
                below.sort()
                if Path(folder) != self.root and (Path(folder) / self.lost).is_file():
                    return f"\n{quoted(self.lost)} is in {folder}: give data.root={folder}"
                if name in files and not same_name:
                    same_name = f"\na file {quoted(name)} is in {folder}: correct the paths, or give data.root={folder}"
        return same_name


def find_paths(cells: Sequence[str], root: Path, config: DataConfig) -> ImagePaths:
    """How the paths of a table are read, by the first of `cells` that means an image in some way."""
    for cell in cells:
        if (paths := _paths_like(cell, root, config)) is not None:
            return paths
    return ImagePaths(root, config.image_extensions)


def _paths_like(cell: str, root: Path, config: DataConfig) -> ImagePaths | None:
    """How the paths of a table are read in which `cell` means an image; None if it can't mean one."""
    paths = ImagePaths(root, config.image_extensions)
    text = cell.strip().replace("\\", "/")
    for start in _starts(_below(text, root), root):
        rest = text[len(text) - len(start) :]
        for suffix in ("",) if start.lower().endswith(ALL_EXTENSIONS) else ("", *config.image_extensions):
            paths.prefix, paths.suffix = text[: len(text) - len(start)] if start != _below(text, root) else "", suffix
            if isinstance(paths.find(text), FoundImage) and rest:
                if paths.prefix:
                    paths.notes.append(f"{paths.prefix} in the paths means {root}")
                if suffix:
                    paths.notes.append(f"the paths lack {suffix}")
                paths.lost = ""
                return paths
    return None


def _starts(text: str, root: Path) -> Iterator[str]:
    """The path, then what is left of it if folders at its beginning are cut off that are not below `root`."""
    yield text
    parts = text.split("/")
    if text.startswith("/") or DRIVE.match(text):
        yield from ("/".join(parts[i:]) for i in range(1, len(parts)))
    elif root.resolve().name in parts[:-1]:  # relative to a folder above
        yield "/".join(parts[parts.index(root.resolve().name) + 1 :])


def _below(text: str, root: Path) -> str:
    """An absolute path relative to `root` if it is below it; other paths unchanged."""
    if text.startswith("/"):
        for folder in (f"{root.absolute()}/", f"{root.resolve()}/"):
            if text.startswith(folder):
                return text[len(folder) :]
    return text


def _forms(name: str) -> Iterable[str]:
    """The ways in which file systems write a name: with umlauts as one character, or as a letter and a sign."""
    if name.isascii():
        return (name,)
    return dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)))
