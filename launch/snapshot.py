"""Code snapshots: a job runs the code that was submitted, even if the checkout is edited while the job waits."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from distil_tl.utils.files import write_atomic

PACKAGES = ("distil_tl", "launch")
SNAPSHOT = "snapshot.json"


def snapshot_path(folder: Path) -> Path:
    """The path below `folder` of a snapshot of the current code. The name is a hash of the content."""
    return _path_of(folder, _read_source())


def take_snapshot(folder: Path) -> Path:
    """Copy the packages and their git commit to a folder below `folder`, unless that copy exists. Returns its path."""
    from distil_tl.rundir import directory  # imports torch

    files = _read_source()  # once, so that the copy and the hash in its name agree if a file is edited meanwhile
    target = _path_of(folder, files)
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        for path, content in files.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(content)
        write_atomic(partial / "distil_tl" / SNAPSHOT, json.dumps(directory.git_state()) + "\n")
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) or not target.exists():  # otherwise another process created it first
            raise
    return target


def _path_of(folder: Path, files: Mapping[Path, bytes]) -> Path:
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(f"{path}\0".encode())
        digest.update(content)
    return folder / "code" / digest.hexdigest()[:12]


def _source_root() -> Path:
    return Path(__file__).resolve().parents[1]


def _read_source() -> dict[Path, bytes]:
    root = _source_root()
    files = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.name != SNAPSHOT:
                files[path.relative_to(root)] = path.read_bytes()
    return files
