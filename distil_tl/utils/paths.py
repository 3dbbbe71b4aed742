"""Paths that a user names, before anything is done with them."""

from __future__ import annotations

import codecs
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distil_tl.utils.errors import UserError

MAX_NAME = 255  # bytes of a file's name, on every file system of Linux
MAX_PATH = 4095
MAX_BYTES = 2**20  # of a configuration or sweep file


def impossible_paths(values: Mapping[str, str | None], keys: Sequence[str]) -> Iterator[str]:
    """A problem for each value of `keys` that can't be the path of a file or folder."""
    for key in keys:
        path = values[key]
        if path is not None and (reason := path_problem(path)):
            shown = path if len(path) <= 60 else f"{path[:40]}..."
            yield f"{key}={shown!r}: {reason}; give another path"


def path_problem(path: str | Path) -> str:
    """Why this user can have no file or folder at this path; empty if one can be there, whether or not it exists."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        return "it contains a NUL character"
    if len(encoded) > MAX_PATH or max(map(len, encoded.split(b"/"))) > MAX_NAME:
        return "the name is too long"
    try:
        os.stat(path)  # noqa: PTH116 - as it is written
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "symbolic links form a loop"
        if error.errno == errno.EACCES:
            return "no permission to look into a folder above it"
    return ""


def why_no_file(path: Path) -> str:
    """What a path is that exists and is no file, in words. A pipe or a device may never end."""
    return "is a folder, not a file" if path.is_dir() else "is not a regular file"


def read_text(path: Path, what: str) -> str:
    """The text of a small file that the user names, in UTF-8.

    Args:
        what: the kind of file, for messages.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is a folder, a pipe or a device, too large, or not text.
    """
    shown = repr(str(path))
    if path.exists() and not path.is_file():  # a pipe may never end
        raise UserError(f"can't read {what} {shown}: it is not a regular file")
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"can't read {what} {shown}: {size / 1e6:,.1f} MB are too much; is it another file?")
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"can't read {what} {shown}: it is UTF-16; save it as UTF-8")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"can't read {what} {shown}: {reason}") from None
