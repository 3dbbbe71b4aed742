"""Files that are either whole or not there, their checksums, and the cache directory."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distil_tl.utils.errors import WriteError

_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8): a reader, even after a crash, sees the old or the new.

    The parent directory must exist. A symlink at `path` is replaced, not followed.

    Raises:
        OSError: as writing does; `path` is then what it was before.
    """
    path = Path(path)
    # Not tempfile: its files are private to the user, and a run directory is read by colleagues.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: str | Path, obj: object) -> None:
    """`write_atomic` of `obj` as JSON, indented by 2, ending in a newline; NaN and infinities become null.

    Raises:
        TypeError: `obj` holds something that JSON has no word for.
        OSError: as writing does.
    """
    text = json.dumps(json_safe(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is not UTF-8 holds lone surrogates; their backslash form is JSON's own escape for them.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while `path` is written into a WriteError that names it."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"can't write {path}: {error.strerror or error}; what was saved before stays") from error


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits, in constant memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where downloads and derived files are kept; not created here.

    `$DISTIL_TL_CACHE`, else `$XDG_CACHE_HOME/distil_tl`, else `~/.cache/distil_tl`; empty counts as unset.
    """
    if own := os.environ.get("DISTIL_TL_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "distil_tl"
    return Path.home() / ".cache" / "distil_tl"


def json_safe(obj: Any) -> Any:
    """`obj` with null for every number that is not finite, at any depth of dicts, lists and tuples."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: json_safe(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [json_safe(value) for value in obj]
    return obj


def fsync_directory(directory: Path) -> None:
    """Make the new name itself survive a power cut, where the system can."""
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
