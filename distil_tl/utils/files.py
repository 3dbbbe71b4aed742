"""Atomic writes, reading, and checksums."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from distil_tl.utils.errors import WriteError

_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the file `path` by `data` (text as UTF-8). A reader sees the old or the new file, even after a crash.

    The parent directory must exist. A symlink at `path` is replaced, not followed.

    Raises:
        OSError: the file can't be written; `path` is unchanged.
    """
    write_parts(path, [data.encode() if isinstance(data, str) else data])


def write_parts(path: str | Path, parts: Iterable[bytes]) -> None:
    """As `write_atomic`, for data that need not be in memory at once."""
    path = Path(path)
    # Not tempfile: only the user may read its files, and colleagues read run directories.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: str | Path, obj: object) -> None:
    """Write `obj` as JSON by `write_atomic`, indented by 2, with a final newline; NaN and infinities become null.

    Raises:
        TypeError: JSON has no form for a value in `obj`.
        OSError: the file can't be written; `path` is unchanged.
    """
    # A file name that is not UTF-8 holds lone surrogates; JSON's escape for them is their backslash form.
    write_atomic(path, json_text(obj).encode("utf-8", "backslashreplace"))


def json_text(obj: object) -> str:
    """`obj` as `write_json` writes it. Raises TypeError as that does."""
    return json.dumps(json_safe(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names `path`, the file or folder being written."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"can't write {path}: {error.strerror or error}; files saved before are unchanged") from error


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, to read. Anything else is refused: a pipe in its place would be waited for without end.

    Raises:
        OSError: it can't be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: str | Path) -> str:
    """The text of a regular file in UTF-8. Raises OSError, or ValueError if it is not UTF-8."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
        return file.read()


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises OSError as `open_regular`, or ValueError for any damage."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a regular file, 64 hex digits. Reads in blocks, so memory use is constant."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_safe(obj: Any) -> Any:
    """`obj` with None for every float that is not finite, at any depth of dicts, lists and tuples."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: json_safe(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [json_safe(value) for value in obj]
    return obj


def fsync_directory(directory: Path) -> None:
    """Flush a directory to disk where the system can, so that a new file name survives a power failure."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    finally:
        os.close(handle)
