"""The folder that `distil-tl soup` writes: what it may replace, and how it is filled."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distil_tl.utils.errors import UserError
from distil_tl.utils.files import fsync_directory, read_json
from distil_tl.utils.log import printable
from distil_tl.utils.signals import removed_on_signal


def check_folder(output: Path, inputs: Sequence[Path]) -> None:
    """Raises UserError if `output` can't be made, or is something else than an earlier output of this command."""
    shown = f"-o {printable(output)}"
    if not output.parent.is_dir():
        raise UserError(f"{shown}: there is no folder {printable(output.parent)}")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"{shown}: no permission to write in {printable(output.parent)}")
    resolved = output.resolve()
    if any(resolved == path.resolve() or resolved in path.resolve().parents for path in inputs):
        raise UserError(f"{shown} is one of the inputs: name a new folder")
    if os.path.lexists(output) and not (output.is_dir() and (_is_soup(output) or not any(output.iterdir()))):
        raise UserError(f"{shown} exists, and is no earlier output of this command: name a new folder, or remove it")


def _is_soup(folder: Path) -> bool:
    try:
        return "soup" in read_json(folder / "summary.json")
    except (OSError, ValueError):
        return False


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output` for the body to fill, which then replaces it.

    If the body raises, or a signal ends the process in it, nothing is left.

    Raises:
        UserError: it can't be written.
    """
    partial, earlier = (output.with_name(f".{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        with removed_on_signal(partial):
            partial.mkdir()
            yield partial
        if output.exists():
            output.rename(earlier)
        partial.rename(output)
        fsync_directory(output.parent)
    except OSError as error:
        raise UserError(f"can't write {printable(output)}: {error.strerror or error}") from error
    finally:
        for folder in (partial, earlier):
            shutil.rmtree(folder, ignore_errors=True)
