"""Scan of a split: the names and sizes of its images, without opening them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distil_tl.data.config import IMG_EXTENSIONS
from distil_tl.data.index import Array, Index, bytes_array, fingerprint_of, listed, quoted
from distil_tl.utils.errors import UserError, did_you_mean


def scan(
    split: str | Path,
    classes: Sequence[str] | None = None,
    threads: int = 8,
    extensions: tuple[str, ...] = IMG_EXTENSIONS,
) -> Index:
    """The index of all images in the folder `split`, which has one sub-folder per class; no image is opened.

    Samples are in ImageFolder's order: by class name, by folder, by file name. Symbolic links are followed.

    Args:
        classes: class names, which decide the targets (those of the training split). A class may have no image here;
            `Index.missing` lists such classes. None: the sorted names of the sub-folders, each of which must contain
            an image.
        threads: number of class folders read in parallel, to hide the latency of a network file system.
        extensions: how the names of images end, in lower case.

    Raises:
        UserError: the folder does not exist, has no class folders or no images, or may not be read; a class folder
            has no images, or is not in `classes`; a symbolic link is broken or forms a loop; an image is not a
            regular file.
        ValueError: `classes` contains a name twice.
    """
    split = Path(split)
    folders, other_files = _class_folders(split, extensions)
    all_required = classes is None
    classes = tuple(folders if classes is None else classes)
    target_of = {name: target for target, name in enumerate(classes)}
    if len(target_of) != len(classes):
        raise ValueError("classes must differ from each other")
    if unknown := [name for name in folders if name not in target_of]:
        raise UserError(_unknown_classes_message(split, unknown, classes))

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda name: _scan_class(split, name, extensions), folders))
    empty = [name for name, part in zip(folders, parts, strict=True) if not len(part.sizes)]
    if len(empty) == len(folders) or (empty and all_required):
        raise UserError(_empty_classes_message(split, empty, len(folders), extensions))

    targets = np.repeat(
        np.array([target_of[name] for name in folders], dtype=np.int32), [len(part.sizes) for part in parts]
    )
    names = np.concatenate([part.names for part in parts])
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), *(part.lengths for part in parts)]).cumsum()
    sizes = np.concatenate([part.sizes for part in parts])
    return Index(
        root=split,
        classes=classes,
        names=names,
        offsets=offsets,
        targets=targets,
        sizes=sizes,
        ignored=other_files + sum(part.ignored for part in parts),
        fingerprint=fingerprint_of(classes, names, offsets, targets, sizes),
        times=hashlib.sha256(b"".join(part.times.astype("<i8").tobytes() for part in parts)).hexdigest(),
    )


class _ClassImages(NamedTuple):
    """The images of one class folder: M of them."""

    names: Array  # uint8
    lengths: Array  # int64 [M], of the names in bytes
    sizes: Array  # int64 [M]
    times: Array  # int64 [M], modification times in nanoseconds
    ignored: int


def _class_folders(split: Path, extensions: tuple[str, ...]) -> tuple[list[str], int]:
    """Sorted names of the sub-folders, and the number of files beside them."""
    if not split.is_dir():
        problem = "is not a folder" if split.exists() else "does not exist"
        raise UserError(f"the folder of images {quoted(split)} {problem}: it must contain one sub-folder per class")
    folders: list[str] = []
    files: list[str] = []
    for entry in _entries(str(split)):
        if _is_folder(entry):
            folders.append(entry.name)
        else:
            _refuse_broken_link(entry, extensions)
            files.append(entry.name)
    if not folders:
        images = sum(name.lower().endswith(extensions) for name in files)
        content = f"{images} images but no sub-folder" if images else "no sub-folder"
        raise UserError(f"{quoted(split)} must contain one sub-folder per class with its images; it has {content}")
    return sorted(folders), len(files)


def _scan_class(split: Path, name: str, extensions: tuple[str, ...]) -> _ClassImages:
    """All images at any depth below one class folder, in the order of a sorted `os.walk` that follows links."""
    ignored = 0
    scanned: list[tuple[str, list[tuple[str, int, int]]]] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(name, (_identity(split),))]
    while pending:
        folder, ancestors = pending.pop()
        identity = _identity(split / folder)
        if identity in ancestors:
            raise UserError(f"{quoted(split / folder)} contains itself: remove the symbolic link that forms this loop")
        images: list[tuple[str, int, int]] = []
        for entry in _entries(f"{split}/{folder}"):
            if _is_folder(entry):
                pending.append((f"{folder}/{entry.name}", (*ancestors, identity)))
            elif entry.name.lower().endswith(extensions):
                images.append((entry.name, *_size_and_time(entry)))
            else:
                _refuse_broken_link(entry, extensions)
                ignored += 1
        scanned.append((folder, sorted(images)))
    # Sorted by the whole path as a string, like the folders of os.walk: "a-b" comes before "a/b".
    scanned.sort()
    names = [os.fsencode(f"{folder}/{image}") for folder, images in scanned for image, _, _ in images]
    return _ClassImages(
        names=bytes_array(b"".join(names)),
        lengths=np.fromiter(map(len, names), dtype=np.int64, count=len(names)),
        sizes=np.array([size for _, images in scanned for _, size, _ in images], dtype=np.int64),
        times=np.array([time for _, images in scanned for _, _, time in images], dtype=np.int64),
        ignored=ignored,
    )


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except PermissionError as error:
        # os.walk would skip it silently, and training would miss its images.
        raise UserError(f"no permission to read the folder {quoted(folder)}: change it, or move the folder") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError as error:
        message = _broken_link_message(entry) if entry.is_symlink() else f"can't read the size of an image: {error}"
        raise UserError(message) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{quoted(entry.path)} is named like an image but is not a regular file: remove it")
    return status.st_size, status.st_mtime_ns


def _refuse_broken_link(entry: os.DirEntry[str], extensions: tuple[str, ...]) -> None:
    """Raise UserError for a broken link that may have been an image or a folder of images.

    Broken links with another extension are ignored: editors create such links as lock files.
    """
    may_matter = entry.name.lower().endswith(extensions) or not Path(entry.name).suffix
    if may_matter and entry.is_symlink() and not Path(entry.path).exists():
        raise UserError(_broken_link_message(entry))


def _broken_link_message(entry: os.DirEntry[str]) -> str:
    target = Path(entry.path).readlink()
    return f"the symbolic link {quoted(entry.path)} is broken: restore {quoted(target)} or remove the link"


def _unknown_classes_message(split: Path, unknown: Sequence[str], classes: Sequence[str]) -> str:
    folders = [quoted(name) + (did_you_mean(name, classes) or _hidden_folder_note(name)) for name in unknown]
    return (
        f"{quoted(split)} has class folders that the training split does not have: {listed(folders, 8)}; "
        "rename, move or remove them"
    )


def _empty_classes_message(split: Path, empty: Sequence[str], total: int, extensions: Sequence[str]) -> str:
    if len(empty) == total:
        problem = f"no images in any of the {total} class folders of {quoted(split)}"
    else:
        folders = listed([quoted(name) + _hidden_folder_note(name) for name in empty], 8)
        problem = f"class folders without images in {quoted(split)}: {folders}; add images or remove the folders"
    return f"{problem}. Images are files with one of the extensions {', '.join(extensions)}"


def _hidden_folder_note(name: str) -> str:
    return " (a hidden folder, probably left by a tool)" if name.startswith(".") else ""
