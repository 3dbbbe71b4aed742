"""The walk through folders of images, for training, prediction and copies: which files are images, and which not.

Symbolic links are followed. What file managers and notebooks leave behind is left out, and so are run directories, in
which images are samples of others.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distil_tl.data.index import Index, quoted
from distil_tl.utils.errors import UserError, listed
from distil_tl.utils.run_folders import CHECKPOINTS, is_run_directory

# Folders of Jupyter, macOS, Synology, Thumbnails of several programs; with copies of images or parts of them.
LEFTOVER_FOLDERS = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".thumbnails", ".AppleDouble", ".Trashes", "lost+found")
LEFTOVER_FILES = "._"  # AppleDouble: the metadata of a file of the same name
RUN = "run directory"  # how one is counted
MOST_ENDINGS = 6
MOST_ENTRIES, MOST_FOLDERS = 20_000, 500  # below data.root, until which images that a table lacks are counted


class Found(NamedTuple):
    """One image: its name, bytes, and modification time in nanoseconds."""

    name: str
    size: int
    time: int


def walk(top: Path, start: str, extensions: tuple[str, ...], ignored: Counter[str]) -> list[tuple[str, list[Found]]]:
    """The images at any depth below the folder `start` of `top`, by folder, in the order of a sorted `os.walk`.

    Args:
        start: relative to `top`, with "/" between folders; empty for `top` itself.
        extensions: how the names of images end, in lower case.
        ignored: counts what is left out, by `ending_of`.

    Returns:
        Folders relative to `top`, each with its images, both sorted.

    Raises:
        UserError: a folder may not be read, a symbolic link is broken or forms a loop, an image is not a regular file.
    """
    scanned: list[tuple[str, list[Found]]] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(start, (_identity(top),) if start else ())]
    while pending:
        folder, ancestors = pending.pop()
        identity = _identity(top / folder)
        if identity in ancestors:
            raise UserError(f"{quoted(top / folder)} contains itself: remove the symbolic link that forms this loop")
        images, below, left = list[Found](), list[str](), Counter[str]()
        for entry in entries(f"{top}/{folder}" if folder else str(top)):
            if is_leftover(entry):
                left[ending_of(entry.name)] += 1
            elif is_folder(entry):
                below.append(entry.name)
            elif entry.name.lower().endswith(extensions):
                images.append(Found(entry.name, *_size_and_time(entry)))
            else:
                refuse_broken_link(entry, extensions)
                left[ending_of(entry.name)] += 1
        if CHECKPOINTS in below and is_run_directory(top / folder):
            ignored[RUN] += 1
            continue
        ignored.update(left)
        pending += [(f"{folder}/{name}" if folder else name, (*ancestors, identity)) for name in below]
        scanned.append((folder, sorted(images)))
    # Sorted by the whole path as a string, like the folders of os.walk: "a-b" comes before "a/b".
    return sorted(scanned)


def images_beside(index: Index, extensions: tuple[str, ...]) -> int:
    """How many images below the root of a table it does not name; 0 where there is too much to look at.

    Links to folders are not followed. Sizes are not read.
    """
    if len(index) > MOST_ENTRIES:
        return 0
    known, found, seen = set(index.relative_paths()), 0, 0
    folders = [""]
    for folder in folders:  # it grows
        try:
            below, here = list[str](), 0
            with os.scandir(index.root / folder) as inside:
                for entry in inside:
                    seen += 1
                    if seen > MOST_ENTRIES or len(folders) + len(below) > MOST_FOLDERS:
                        return 0
                    name = folder + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        below += [] if is_leftover(entry) else [f"{name}/"]
                    elif name.lower().endswith(extensions) and not is_leftover(entry):
                        here += os.fsencode(name) not in known
        except OSError:
            continue
        if f"{folder}{CHECKPOINTS}/" in below and is_run_directory(index.root / folder):
            continue
        found += here
        folders += below
    return found


def entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            yield from found
    except PermissionError as error:
        # os.walk would skip it silently, and training would miss its images.
        raise UserError(f"no permission to read the folder {quoted(folder)}: change it, or move the folder") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_leftover(entry: os.DirEntry[str]) -> bool:
    """Whether another program left it behind: its images are copies, or not images."""
    return entry.name.startswith(LEFTOVER_FILES) or (entry.name in LEFTOVER_FOLDERS and is_folder(entry))


def ending_of(name: str) -> str:
    """How files are counted that are left out: by extension, or by the name of what another program left behind."""
    if name in LEFTOVER_FOLDERS:
        return name
    if name.startswith(LEFTOVER_FILES):
        return f"{LEFTOVER_FILES}*"
    return Path(name).suffix.lower() or "without an extension"


def describe(ignored: Counter[str]) -> str:
    """What was left out, such as `7 other files ignored: 3 .heic, 2 .gif, 2 ._*`; empty if nothing was."""
    files = sorted(
        ((ending, n) for ending, n in ignored.items() if ending != RUN), key=lambda item: (-item[1], item[0])
    )
    total, runs, said = sum(count for _, count in files), ignored[RUN], []
    if total:
        parts = [f"{count:,} {ending}" for ending, count in files]
        said.append(f"{total:,} other {'file' if total == 1 else 'files'} ignored: {listed(parts, MOST_ENDINGS)}")
    if runs:
        said.append(f"{runs:,} run {'directory' if runs == 1 else 'directories'} not searched")
    return "; ".join(said)


def refuse_broken_link(entry: os.DirEntry[str], extensions: tuple[str, ...]) -> None:
    """Raise UserError for a broken link that may have been an image or a folder of images.

    Broken links with another extension are ignored: editors create such links as lock files.
    """
    may_matter = entry.name.lower().endswith(extensions) or not Path(entry.name).suffix
    if may_matter and entry.is_symlink() and not Path(entry.path).exists():
        raise UserError(_broken_link_message(entry))


def _broken_link_message(entry: os.DirEntry[str]) -> str:
    target = Path(entry.path).readlink()
    return f"the symbolic link {quoted(entry.path)} is broken: restore {quoted(target)} or remove the link"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError as error:
        message = _broken_link_message(entry) if entry.is_symlink() else f"can't read the size of an image: {error}"
        raise UserError(message) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{quoted(entry.path)} is named like an image but is not a regular file: remove it")
    return status.st_size, status.st_mtime_ns
