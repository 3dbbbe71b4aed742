"""Folders of a run: can they be written to, and do all nodes see the same one."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distil_tl.data.config import ARCHIVES
from distil_tl.doctor.lines import FAIL, OK, WARN, Report, alike, name_ranks, size

if TYPE_CHECKING:
    from distil_tl.doctor.facts import Facts

GROUP = "folders"
POLL_SECONDS = 0.1
VISIBLE_SECONDS = 20.0  # a network file system may show a new file on other nodes this late
REMEDIES = {  # by name of the folder
    "run_dir": "choose another run_dir",
    "data.root": "all ranks must see the images, under the same path",
    "data.stage_to": "the images are read from data.root instead, which may be slow",
    "cache": "set DISTIL_TL_CACHE to a folder that can be written to",
}
UNPACKED = "data.root is a tar file, which each node unpacks there: choose another data.stage_to"


@dataclass
class FolderFacts:
    """A folder, or a tar file of images, as one rank sees it. JSON-able.

    Attributes:
        path: as configured.
        existing: the folder itself or, if it does not exist yet, the nearest one above it.
        problem: why it can't be read or written to; None if it can.
        free: bytes.
        archive: bytes of the tar file; None if it is none.
    """

    path: str
    existing: str
    problem: str | None
    free: int
    archive: int | None = None


def probe_folder(path: str, write: bool) -> FolderFacts:
    """Whether a folder, which need not exist if it is written to, can be used. Leaves nothing behind.

    A file without a name is written to it, or to the nearest folder above it that exists.
    """
    folder = Path(path)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    problem = None
    try:
        if not write and path.endswith(ARCHIVES) and folder.is_file():
            readable = os.access(folder, os.R_OK)
            problem = None if readable else f"there is no permission to read {folder}"
            return FolderFacts(path, path, problem, 0, folder.stat().st_size)
        if not existing.is_dir():
            problem = f"{existing} is not a folder"
        elif write:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        elif existing != folder:
            problem = f"{folder} does not exist"
        elif not os.access(folder, os.R_OK | os.X_OK):
            problem = f"there is no permission to read {folder}"
        return FolderFacts(path, str(existing), problem, _free(existing))
    except OSError as error:
        return FolderFacts(path, str(existing), f"{existing}: {error.strerror or error}", 0)


def archive_size(facts: Sequence[Facts]) -> int | None:
    """Bytes of the tar file that `data.root` names; None if it names none, or no rank sees it."""
    found = [each.folders["data.root"].archive for each in facts if "data.root" in each.folders]
    return next((size for size in found if size is not None), None)


def _free(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


class Marks:
    """Files that rank 0 writes to some folders, to see whether other ranks see them. `remove` deletes them.

    Attributes:
        names: of the files, by name of the folder.
    """

    def __init__(self, folders: Mapping[str, FolderFacts]) -> None:
        self.names: dict[str, str] = {}
        self._paths: list[Path] = []
        for name, folder in folders.items():
            path = Path(folder.existing) / f".distil_tl-doctor-{secrets.token_hex(8)}"
            try:
                path.touch()
            except OSError:  # `probe_folder` has found the reason
                continue
            self.names[name] = path.name
            self._paths.append(path)

    def remove(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


def unseen(folders: Mapping[str, FolderFacts], names: Mapping[str, str]) -> list[str]:
    """The folders in which this rank does not see rank 0's file within `VISIBLE_SECONDS`.

    Each rank looks in its own folder: a relative path may lead elsewhere.
    """
    left = {name: Path(folders[name].existing) / file for name, file in names.items() if name in folders}
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        left = {name: path for name, path in left.items() if not _is_visible(path)}
        if not left or time.monotonic() > deadline:
            return sorted(left)
        time.sleep(POLL_SECONDS)


def _is_visible(path: Path) -> bool:
    try:
        os.listdir(path.parent)  # noqa: PTH208 - a client of NFS then asks the server again
        return path.exists()
    except OSError:
        return False


def judge_folders(
    report: Report, facts: Sequence[Facts], unseen_by: Mapping[int, Sequence[str]], needed: Callable[[str], bool]
) -> None:
    """Lines about each folder: can every rank use it, and do all see the same one.

    Args:
        unseen_by: by rank, the names of the folders in which it does not see the file of rank 0.
        needed: whether a run can't do without a folder, by its name.
    """
    remedies = REMEDIES if archive_size(facts) is None else {**REMEDIES, "data.stage_to": UNPACKED}
    for name in facts[0].folders:
        bad = FAIL if needed(name) else WARN
        results = {}
        for each in facts:
            folder = each.folders.get(name)
            if folder is None:
                continue  # the reason is in `failed`
            text = folder.path if name == "data.root" else f"{folder.path}, {size(folder.free)} free"
            results[each.rank] = (OK, text) if folder.problem is None else (bad, f"{folder.problem}; {remedies[name]}")
        sound = all(status == OK for status, _ in results.values())
        report.per_rank(GROUP, name, alike(results) if sound else results)
        blind = [rank for rank, names in unseen_by.items() if name in names]
        if blind:
            _judge_unshared(report, name, blind, facts)


def _judge_unshared(report: Report, name: str, blind: Sequence[int], facts: Sequence[Facts]) -> None:
    """Lines about a folder in which some ranks do not see what rank 0 has written."""
    hosts = ", ".join(sorted({each.host for each in facts if each.rank in blind}))
    where = f"{name_ranks(blind)} on {hosts}"
    if name == "run_dir":
        report.fail(
            GROUP, name, f"what rank 0 writes there is not visible to {where}: it must be on storage that all nodes "
            f"share, under the same path (a relative path starts where each process starts)",
        )  # fmt: skip
    elif name == "cache":
        report.warn(
            GROUP, name, f"what rank 0 writes there is not visible to {where}, so stages cannot train on features; set "
            f"DISTIL_TL_CACHE to storage that all nodes share",
        )  # fmt: skip
