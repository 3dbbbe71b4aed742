"""Scan of a split: the names and sizes of its images, without opening them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distil_tl.data.config import IMG_EXTENSIONS
from distil_tl.data.index import Array, Index, bytes_array, fingerprint_of, quoted
from distil_tl.data.walk import describe, ending_of, entries, is_folder, is_leftover, refuse_broken_link, walk
from distil_tl.utils.errors import UserError, did_you_mean, listed
from distil_tl.utils.run_folders import no_images


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
    folders, ignored = _class_folders(split, extensions)
    all_required = classes is None
    classes = tuple(folders if classes is None else classes)
    target_of = {name: target for target, name in enumerate(classes)}
    if len(target_of) != len(classes):
        raise ValueError("classes must differ from each other")
    if unknown := [name for name in folders if name not in target_of]:
        raise UserError(_unknown_classes_message(split, unknown, classes))

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda name: _scan_class(split, name, extensions), folders))
    for part in parts:
        ignored.update(part.ignored)
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
        ignored=ignored.total(),
        ignored_note=describe(ignored),
        fingerprint=fingerprint_of(classes, names, offsets, targets, sizes),
        times=hashlib.sha256(b"".join(part.times.astype("<i8").tobytes() for part in parts)).hexdigest(),
    )


class _ClassImages(NamedTuple):
    """The images of one class folder: M of them."""

    names: Array  # uint8
    lengths: Array  # int64 [M], of the names in bytes
    sizes: Array  # int64 [M]
    times: Array  # int64 [M], modification times in nanoseconds
    ignored: Counter[str]


def _class_folders(split: Path, extensions: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """Sorted names of the sub-folders, and what is left out beside them, by ending."""
    if not split.is_dir():
        problem = "is not a folder" if split.exists() else "does not exist"
        raise UserError(f"the folder of images {quoted(split)} {problem}: it must contain one sub-folder per class")
    if problem := no_images(split):
        raise UserError(problem)
    folders: list[str] = []
    files: list[str] = []
    for entry in entries(str(split)):
        if is_folder(entry) and not is_leftover(entry):
            folders.append(entry.name)
        else:
            refuse_broken_link(entry, extensions)
            files.append(entry.name)
    if not folders:
        images = sum(name.lower().endswith(extensions) for name in files)
        content = f"{images} images but no sub-folder" if images else "no sub-folder"
        raise UserError(f"{quoted(split)} must contain one sub-folder per class with its images; it has {content}")
    return sorted(folders), Counter(map(ending_of, files))


def _scan_class(split: Path, name: str, extensions: tuple[str, ...]) -> _ClassImages:
    """All images at any depth below one class folder."""
    ignored: Counter[str] = Counter()
    scanned = walk(split, name, extensions, ignored)
    names = [os.fsencode(f"{folder}/{image.name}") for folder, images in scanned for image in images]
    return _ClassImages(
        names=bytes_array(b"".join(names)),
        lengths=np.fromiter(map(len, names), dtype=np.int64, count=len(names)),
        sizes=np.array([image.size for _, images in scanned for image in images], dtype=np.int64),
        times=np.array([image.time for _, images in scanned for image in images], dtype=np.int64),
        ignored=ignored,
    )


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
