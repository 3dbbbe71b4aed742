"""The code that a job runs is the code that was submitted, whatever is edited while it waits."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from distil_tl.files import write_atomic
from distil_tl.rundir import git_state

PACKAGES = ("distil_tl", "launch")
SNAPSHOT = "snapshot.json"


def snapshot_path(folder: Path) -> Path:
    """Where below `folder` a copy of the code as it is now belongs: named by its content, so it never changes."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(f"{path}\0".encode())
        digest.update((_source() / path).read_bytes())
    return folder / "code" / digest.hexdigest()[:12]


def take_snapshot(folder: Path) -> Path:
    """Copy the packages that run now to `snapshot_path`, unless they are there, with the commit they are of."""
    target = snapshot_path(folder)
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    for path in _files():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_source() / path, partial / path)
    write_atomic(partial / "distil_tl" / SNAPSHOT, json.dumps(git_state()) + "\n")
    try:
        partial.rename(target)
    except OSError:  # somebody else was faster
        shutil.rmtree(partial)
        if not target.exists():
            raise
    return target


def _source() -> Path:
    return Path(__file__).resolve().parents[1]


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((_source() / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.name != SNAPSHOT:
                yield path.relative_to(_source())
