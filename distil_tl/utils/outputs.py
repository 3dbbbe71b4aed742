"""Files that commands write for the user, at a path that the user names.

A regular file is replaced when its new content is complete. Anything else, such as a device, a pipe or /dev/stdout, is
written into. Whether the path can be written is checked before the work whose result it gets.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from distil_tl.utils.errors import UserError
from distil_tl.utils.log import printable
from distil_tl.utils.signals import removed_on_signal

_OPEN = ("/dev/fd/", "/dev/stdout", "/dev/stderr", "/proc/")  # names of files that are open already
# A name that is not UTF-8 holds lone surrogates, which UTF-8 can't encode.
_ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}


def check_output(
    option: str,
    path: Path,
    inputs: Iterable[Path] = (),
    image_endings: tuple[str, ...] = (),
    earlier: tuple[bytes, ...] | None = None,
    *,
    whole: bool = False,
) -> None:
    """Refuse an output that can't be written, or that would destroy an input or another file of the user.

    Args:
        option: as the user gave it, for messages.
        inputs: files and folders that the command reads.
        image_endings: of the names of images, in lower case.
        earlier: how a file begins that the command wrote earlier, the only kind that is replaced; None: any file is.
        whole: the output is a regular file, and not a device or a pipe to write into.

    Raises:
        UserError: `path` is a folder, in a folder that does not exist or can't be written to, an input, named like an
            image, or another file than an earlier output.
    """
    shown = f"{option} {printable(path)}"
    if path.is_dir():
        raise UserError(f"{shown} is a folder: name a file in it")
    if whole and path.exists() and not _is_replaced(path):
        raise UserError(f"{shown} is not a regular file: name another file")
    if not path.parent.is_dir():
        raise UserError(f"{shown}: there is no folder {printable(path.parent)}")
    own = _identity(path)
    if own is not None and any(_identity(given) == own for given in inputs):
        raise UserError(f"{shown} is one of the inputs: name another file")
    if path.name.lower().endswith(image_endings):
        raise UserError(f"{shown} is named like an image: name another file")
    if _target(path).name.lower().endswith(image_endings):
        raise UserError(
            f"{shown} is a link to {printable(_target(path))}, which is named like an image: name another file"
        )
    if not _is_replaced(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{shown}: no permission to write to it")
        return
    if earlier is not None and not _begins_with(path, earlier):
        raise UserError(f"{shown} exists, and is no earlier output of this command: name another file, or remove it")
    partial = _partial(_target(path))
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(f"{shown}: can't write in {printable(partial.parent)}: {error.strerror or error}") from None


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """A text file in UTF-8 to write; `path` is replaced when it is complete. None: standard output.

    A link to a file keeps pointing to it. If the body raises, a regular file is unchanged.

    Raises:
        UserError: the file can't be written.
    """
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # on a terminal without UTF-8 too
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # its reader has exited
            raise
        except OSError as error:
            if error.filename is not None:  # of the body
                raise
            with suppress(OSError):
                sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  # else Python tries again at exit
            raise UserError(f"can't write to standard output: {error.strerror or error}") from error
        return
    if not _is_replaced(path):
        try:  # "a": as /dev/stdout, it may be a file with earlier content, such as a log
            with path.open("a", newline="", **_ENCODING) as file:  # type: ignore[call-overload]
                yield file
        except BrokenPipeError:  # its reader has exited
            raise
        except OSError as error:
            if error.filename not in (None, str(path)):  # of the body
                raise
            raise UserError(f"can't write {printable(path)}: {error.strerror or error}") from error
        return
    with replaced_output(path) as partial, partial.open("x", newline="", **_ENCODING) as file:  # type: ignore[call-overload]
        yield file


@contextmanager
def replaced_output(path: Path) -> Iterator[Path]:
    """A new name beside `path`, for the body to write to. When the body ends, that file replaces `path`.

    A link to a file keeps pointing to it. If the body raises, or a signal ends the process in it, nothing is left, and
    `path` is unchanged.

    Raises:
        UserError: the file can't be written.
    """
    target = _target(path)
    partial = _partial(target)
    try:
        with removed_on_signal(partial):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
    except OSError as error:
        if error.filename not in (None, str(partial)):  # of the body
            raise
        raise UserError(f"can't write {printable(path)}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """Equal for two names of one file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _begins_with(path: Path, beginnings: tuple[bytes, ...]) -> bool:
    """Whether a file begins like one of these, is empty, or does not exist; false if it can't be read."""
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, beginnings), default=1))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not start or start.startswith(beginnings)


def _is_replaced(path: Path) -> bool:
    """Whether a path is a regular file, or none yet; false for devices, pipes and files that are open already."""
    try:
        return stat.S_ISREG(path.stat().st_mode) and not str(path.absolute()).startswith(_OPEN)
    except FileNotFoundError:
        return True


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _partial(target: Path) -> Path:
    """A new name beside `target`, which is short: file systems limit the length of names."""
    return target.with_name(f".{secrets.token_hex(8)}.tmp")
