"""The code that a job runs is the code that was submitted, whatever is edited while it waits."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from distil_tl.rundir.directory import git_state
from distil_tl.utils.files import write_atomic

PACKAGES = ("distil_tl", "launch")
SNAPSHOT = "snapshot.json"


def snapshot_path(folder: Path) -> Path:
    """Where below `folder` a copy of the code as it is now belongs: named by its content, so it never changes."""
    return _place(folder, _read())


def take_snapshot(folder: Path) -> Path:
    """A copy of the packages as they are now, below `folder`, with the commit they are of; made unless it is there."""
    files = _read()  # once: what is edited from here on is neither in the copy nor in its name
    target = _place(folder, files)
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    for path, content in files.items():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).write_bytes(content)
    write_atomic(partial / "distil_tl" / SNAPSHOT, json.dumps(git_state()) + "\n")
    try:
        partial.rename(target)
    except OSError:  # somebody else was faster
        shutil.rmtree(partial)
        if not target.exists():
            raise
    return target


def _place(folder: Path, files: Mapping[Path, bytes]) -> Path:
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(f"{path}\0".encode())
        digest.update(content)
    return folder / "code" / digest.hexdigest()[:12]


def _source() -> Path:
    return Path(__file__).resolve().parents[1]


def _read() -> dict[Path, bytes]:
    found = {}
    for package in PACKAGES:
        for path in sorted((_source() / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.name != SNAPSHOT:
                found[path.relative_to(_source())] = path.read_bytes()
    return found
