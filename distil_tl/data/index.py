"""One scan of an ImageFolder split, packed in arrays: cheap to broadcast and to hold for 10 million files."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distil_tl.data.config import IMG_EXTENSIONS
from distil_tl.distributed.shared_memory import SharedArrays
from distil_tl.utils.errors import UserError, did_you_mean

Array = npt.NDArray[Any]
ARRAYS = ("names", "offsets", "targets", "sizes")  # the fields of an Index that grow with it


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split: N samples of C classes, in the order of `torchvision.datasets.ImageFolder`.

    Attributes:
        root: the split's folder.
        classes: class names; a target is a position in them.
        names: uint8, all paths relative to `root` with "/" between folders, as bytes on disk, end to end.
        offsets: int64 [N + 1]; path i is `names[offsets[i]:offsets[i + 1]]`.
        targets: int32 [N].
        sizes: int64 [N], file sizes in bytes.
        ignored: how many files were left out: no image by their extension, or not inside a class folder.
        fingerprint: SHA-256, 64 hex digits, of classes, relative paths, targets and sizes. Neither `root` nor
            any time goes in, so a copied folder has the same one.
        times: SHA-256 of when each file last changed, for telling whether a copy made earlier is still of these.
        copy: where this process reads the split in place of `root`, which is the name it has in messages and
            records; None: at `root`.
        shared: the memory that the arrays are in where other processes can have it, too: one that is being started
            gets that, and no copy.
    """

    root: Path
    classes: tuple[str, ...]
    names: Array
    offsets: Array
    targets: Array
    sizes: Array
    ignored: int
    fingerprint: str
    times: str = ""
    copy: Path | None = None
    shared: SharedArrays | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def relative(self, i: int) -> str:
        """Path of sample i below `root`; raises IndexError."""
        i = range(len(self))[i]
        return os.fsdecode(self.names[self.offsets[i] : self.offsets[i + 1]].tobytes())

    def path(self, i: int) -> Path:
        """Path of sample i; raises IndexError."""
        return self.root / self.relative(i)

    def file(self, i: int) -> Path:
        """Where this process reads sample i; raises IndexError."""
        return (self.copy or self.root) / self.relative(i)

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: target for target, name in enumerate(self.classes)}

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(path, target) of every sample as in ImageFolder; built at each access, so not for millions."""
        targets = self.targets.tolist()
        return [(f"{self.root}/{os.fsdecode(n)}", t) for n, t in zip(_encoded(self), targets, strict=True)]

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """How many samples each class has, int64 [C]."""
        return np.bincount(self.targets, minlength=len(self.classes)).astype(np.int64)

    @property
    def missing(self) -> tuple[str, ...]:
        """The classes without an image in this split; none where `scan` took the classes from the split."""
        return tuple(name for name, count in zip(self.classes, self.class_counts, strict=True) if count == 0)

    def to_arrays(self) -> dict[str, Array]:
        """Everything as flat numpy arrays, for a broadcast or `np.savez`; `from_arrays` is the way back."""
        return {
            "root": _bytes_array(os.fsencode(self.root)),
            "classes": _bytes_array(_joined(self.classes)),
            "names": self.names,
            "offsets": self.offsets,
            "targets": self.targets,
            "sizes": self.sizes,
            "ignored": np.array([self.ignored], dtype=np.int64),
            "fingerprint": _bytes_array(self.fingerprint.encode()),
            "times": _bytes_array(self.times.encode()),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Index:
        return cls(
            root=Path(os.fsdecode(arrays["root"].tobytes())),
            classes=tuple(os.fsdecode(arrays["classes"].tobytes()).split("\0")),
            names=arrays["names"],
            offsets=arrays["offsets"],
            targets=arrays["targets"],
            sizes=arrays["sizes"],
            ignored=int(arrays["ignored"][0]),
            fingerprint=arrays["fingerprint"].tobytes().decode(),
            times=arrays["times"].tobytes().decode() if "times" in arrays else "",
            shared=arrays if isinstance(arrays, SharedArrays) else None,
        )

    def to_share(self) -> Index:
        """The same in memory that processes can share, where there is such: itself, if it is there already."""
        if self.shared is not None:
            return self
        shared = SharedArrays.copied({name: getattr(self, name) for name in ARRAYS})
        if shared is None:
            return self
        moved: dict[str, Any] = dict(shared)
        return replace(self, **moved, shared=shared)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        shared = self.shared
        if shared is None or get_spawning_popen() is None or any(state[name] is not shared[name] for name in ARRAYS):
            return {**state, "shared": None}
        return {name: value for name, value in state.items() if name not in ARRAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared = state["shared"]
        vars(self).update(state if shared is None else {**state, **{name: shared[name] for name in ARRAYS}})


@dataclass(frozen=True)
class Differences:
    """What became of a split between two scans, by relative path; false if nothing did, str() for people."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    resized: tuple[str, ...]
    classes_changed: bool

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.resized or self.classes_changed)

    def __str__(self) -> str:
        kinds = {"added": self.added, "removed": self.removed, "changed in size": self.resized}
        said = [
            f"{len(paths)} {kind} ({_listed([_shown(path) for path in paths], 3)})"
            for kind, paths in kinds.items()
            if paths
        ]
        if self.classes_changed:
            said.append("the list of classes changed")
        return "; ".join(said) or "no difference"


def scan(split: str | Path, classes: Sequence[str] | None = None, threads: int = 8) -> Index:
    """Read the names and sizes of all images below `split`, one sub-folder per class; no image is opened.

    Without `classes` they are the sorted names of the sub-folders; each must hold an image. With `classes`
    (the training split's) targets follow them, and `Index.missing` tells which have no image here.
    Samples are in ImageFolder's order: by class name, by folder, by file name; links are followed.

    Args:
        threads: class folders read at once, which hides the delay of a network file system.

    Raises:
        UserError: no such folder, no class folder in it, a class folder without images, a class that
            `classes` lacks, no image at all, a link in a circle, a broken link, an image that is no regular
            file, a folder that may not be read.
        ValueError: `classes` names a class twice.
    """
    split = Path(split)
    folders, outside = _class_folders(split)
    each_must_be_here = classes is None
    classes = tuple(folders if classes is None else classes)
    target_of = {name: target for target, name in enumerate(classes)}
    if len(target_of) != len(classes):
        raise ValueError("classes must differ from each other")
    if extra := [name for name in folders if name not in target_of]:
        raise UserError(_about_extra(split, extra, classes))

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda name: _scan_class(split, name), folders))
    empty = [name for name, part in zip(folders, parts, strict=True) if not len(part.sizes)]
    if len(empty) == len(folders) or (empty and each_must_be_here):
        raise UserError(_about_empty(split, empty, len(folders)))

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
        ignored=outside + sum(part.ignored for part in parts),
        fingerprint=_fingerprint(classes, names, offsets, targets, sizes),
        times=hashlib.sha256(b"".join(part.times.astype("<i8").tobytes() for part in parts)).hexdigest(),
    )


def differences(old: Index, new: Index) -> Differences:
    """What was added, removed and changed in size between two scans of what should be the same split."""
    left = dict(zip(_encoded(old), old.sizes.tolist(), strict=True))
    added, resized = [], []
    for name, size in zip(_encoded(new), new.sizes.tolist(), strict=True):
        before = left.pop(name, None)
        if before is None:
            added.append(os.fsdecode(name))
        elif before != size:
            resized.append(os.fsdecode(name))
    return Differences(
        added=tuple(added),
        removed=tuple(os.fsdecode(name) for name in left),
        resized=tuple(resized),
        classes_changed=old.classes != new.classes,
    )


class _Part(NamedTuple):
    """The images of one class folder: M of them."""

    names: Array  # uint8
    lengths: Array  # int64 [M], of the names in bytes
    sizes: Array  # int64 [M]
    times: Array  # int64 [M], of the last change, in nanoseconds
    ignored: int


def _class_folders(split: Path) -> tuple[list[str], int]:
    """Sorted names of the sub-folders, and how many files lie beside them."""
    if not split.is_dir():
        what = "is not a folder" if split.exists() else "does not exist"
        raise UserError(f"the folder of images {_shown(split)} {what}: it must hold one sub-folder per class")
    folders: list[str] = []
    files: list[str] = []
    for entry in _entries(str(split)):
        if _is_folder(entry):
            folders.append(entry.name)
        else:
            _refuse_lost_link(entry)
            files.append(entry.name)
    if not folders:
        images = sum(map(_is_image, files))
        found = f"{images} images lie straight in it" if images else "it has none"
        raise UserError(f"{_shown(split)} must hold one sub-folder per class with that class's images, but {found}")
    return sorted(folders), len(files)


def _scan_class(split: Path, name: str) -> _Part:
    """All images at any depth below one class folder, ordered as by a sorted `os.walk` that follows links."""
    ignored = 0
    found: list[tuple[str, list[tuple[str, int, int]]]] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(name, (_identity(split),))]
    while pending:
        folder, ancestors = pending.pop()
        here = _identity(split / folder)
        if here in ancestors:
            raise UserError(
                f"{_shown(split / folder)} is a folder around itself: remove the link that leads in a circle"
            )
        images: list[tuple[str, int, int]] = []
        for entry in _entries(f"{split}/{folder}"):
            if _is_folder(entry):
                pending.append((f"{folder}/{entry.name}", (*ancestors, here)))
            elif _is_image(entry.name):
                images.append((entry.name, *_size_and_time(entry)))
            else:
                _refuse_lost_link(entry)
                ignored += 1
        found.append((folder, sorted(images)))
    # By the whole path as a string, as os.walk's folders are sorted: "a-b" comes before "a/b".
    found.sort()
    names = [os.fsencode(f"{folder}/{image}") for folder, images in found for image, _, _ in images]
    return _Part(
        names=_bytes_array(b"".join(names)),
        lengths=np.fromiter(map(len, names), dtype=np.int64, count=len(names)),
        sizes=np.array([size for _, images in found for _, size, _ in images], dtype=np.int64),
        times=np.array([time for _, images in found for _, _, time in images], dtype=np.int64),
        ignored=ignored,
    )


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except PermissionError as error:
        # os.walk would pass over it in silence, and train without its images.
        raise UserError(f"may not read the folder {_shown(folder)}: change its permissions or move it away") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError as error:
        raise UserError(_about_link(entry) if entry.is_symlink() else f"cannot look at an image: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{_shown(entry.path)} has the name of an image but is no regular file: remove it")
    return status.st_size, status.st_mtime_ns


def _refuse_lost_link(entry: os.DirEntry[str]) -> None:
    """Raise UserError for a broken link that may have been an image or a folder of them.

    One with another extension is let be: editors leave such links as lock files.
    """
    if entry.is_symlink() and (_is_image(entry.name) or not Path(entry.name).suffix) and not Path(entry.path).exists():
        raise UserError(_about_link(entry))


def _about_link(entry: os.DirEntry[str]) -> str:
    target = Path(entry.path).readlink()
    return f"the link {_shown(entry.path)} is broken: bring {_shown(target)} back or remove the link"


def _about_extra(split: Path, extra: Sequence[str], classes: Sequence[str]) -> str:
    folders = [_shown(name) + (did_you_mean(name, classes) or _leftover(name)) for name in extra]
    return (
        f"{_shown(split)} has class folders that the training split lacks: {_listed(folders, 8)}; "
        "rename, move or remove them"
    )


def _about_empty(split: Path, empty: Sequence[str], total: int) -> str:
    if len(empty) == total:
        what = f"there is no image in any of the {total} class folders of {_shown(split)}"
    else:
        named = _listed([_shown(name) + _leftover(name) for name in empty], 8)
        what = f"class folders without an image in {_shown(split)}: {named}; fill or remove them"
    return f"{what}. Images are files whose name ends in {', '.join(IMG_EXTENSIONS)}"


def _leftover(name: str) -> str:
    return " (looks like a tool's leftover)" if name.startswith(".") else ""


def _shown(path: str | Path) -> str:
    """Quoted, and safe to print: line breaks and bytes that are not UTF-8 are escaped."""
    return repr(str(path))


def _listed(items: Sequence[str], most: int) -> str:
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def _encoded(index: Index) -> Iterator[bytes]:
    names = index.names.tobytes()
    ends = index.offsets.tolist()
    return (names[start:end] for start, end in itertools.pairwise(ends))


def _bytes_array(data: bytes) -> Array:
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def _joined(classes: Sequence[str]) -> bytes:
    """One after the other; a NUL is the one byte that no file name holds."""
    return os.fsencode("\0".join(classes))


def _fingerprint(classes: Sequence[str], names: Array, offsets: Array, targets: Array, sizes: Array) -> str:
    digest = hashlib.sha256()
    numbers = (offsets.astype("<i8"), targets.astype("<i4"), sizes.astype("<i8"))
    for part in (_joined(classes), names.tobytes(), *(array.tobytes() for array in numbers)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
