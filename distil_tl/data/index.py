"""The index of a split: its images in packed arrays, cheap to broadcast and to hold for 10 million files."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distil_tl.distributed.shared_memory import SharedArrays
from distil_tl.utils.errors import listed
from distil_tl.utils.log import printable

Array = npt.NDArray[Any]
ARRAYS = ("names", "offsets", "targets", "sizes")  # the fields of an Index whose size depends on the number of images
ROWS_AT_ONCE = 131_072  # paths that are moved at once


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split: N samples of C classes, in the order of `torchvision.datasets.ImageFolder`.

    Attributes:
        root: the split's folder.
        classes: class names; a target is a position in this tuple.
        names: uint8; the paths of all images relative to `root`, concatenated, with "/" between folders, as bytes.
        offsets: int64 [N + 1]; path i is `names[offsets[i]:offsets[i + 1]]`.
        targets: int32 [N].
        sizes: int64 [N], file sizes in bytes.
        ignored: number of files that were ignored: without an image extension, not inside a class folder, or left
            behind by another program.
        ignored_note: the same by ending, in words; empty if there are none.
        fingerprint: SHA-256, 64 hex digits, of classes, relative paths, targets and sizes. It does not depend on `root`
            or on any time, so a copy of the folder has the same fingerprint.
        times: SHA-256 of the modification times of all files; tells whether an earlier copy is still up to date.
        weights: float32 [N], of the images in the training loss; None: all count alike. Part of the fingerprint.
        copy: the folder from which this process reads the split instead of `root`; None: from `root`. Messages and
            records always name `root`.
        shared: the shared memory that holds the arrays, if any. A process that is being started then receives a
            reference to this memory instead of a copy.
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
    ignored_note: str = ""
    weights: Array | None = None
    copy: Path | None = None
    shared: SharedArrays | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def relative_path(self, i: int) -> str:
        """Path of sample i relative to `root`; raises IndexError."""
        i = range(len(self))[i]
        return os.fsdecode(self.names[self.offsets[i] : self.offsets[i + 1]].tobytes())

    def relative_paths(self) -> Iterator[bytes]:
        """The relative paths of all samples, as bytes."""
        for first in range(0, len(self), ROWS_AT_ONCE):
            offsets = self.offsets[first : first + ROWS_AT_ONCE + 1]
            names = self.names[offsets[0] : offsets[-1]].tobytes()
            yield from (names[start:end] for start, end in itertools.pairwise((offsets - offsets[0]).tolist()))

    def path(self, i: int) -> Path:
        """Path of sample i below `root`, for messages and records; raises IndexError."""
        return self.root / self.relative_path(i)

    def local_path(self, i: int) -> Path:
        """Path from which this process reads sample i: in `copy` if there is one; raises IndexError."""
        return (self.copy or self.root) / self.relative_path(i)

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: target for target, name in enumerate(self.classes)}

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(path, target) of every sample, as in ImageFolder. Built at each access: do not use it for millions."""
        targets = self.targets.tolist()
        return [(f"{self.root}/{os.fsdecode(n)}", t) for n, t in zip(self.relative_paths(), targets, strict=True)]

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """Number of samples of each class, int64 [C]."""
        return np.bincount(self.targets, minlength=len(self.classes)).astype(np.int64)

    @property
    def missing(self) -> tuple[str, ...]:
        """The classes without an image in this split; empty if `scan` took the classes from this split."""
        return tuple(name for name, count in zip(self.classes, self.class_counts, strict=True) if count == 0)

    def selected(self, chosen: Array) -> Index:
        """The index of the images for which `chosen`, bool [N], is true, with the same classes."""
        lengths = np.diff(self.offsets)
        names = self.names[np.repeat(chosen, lengths)]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), lengths[chosen].cumsum()])
        targets, sizes = self.targets[chosen], self.sizes[chosen]
        part = replace(self, names=names, offsets=offsets, targets=targets, sizes=sizes)
        plain = replace(part, fingerprint=fingerprint_of(self.classes, names, offsets, targets, sizes), weights=None)
        return plain if self.weights is None else plain.weighted(self.weights[chosen])

    def weighted(self, weights: Array) -> Index:
        """The same index, without weights so far, with the weights float32 [N]."""
        digest = hashlib.sha256(self.fingerprint.encode() + weights.astype("<f4").tobytes()).hexdigest()
        return replace(self, weights=weights, fingerprint=digest)

    def to_arrays(self) -> dict[str, Array]:
        """The index as flat numpy arrays, for a broadcast or `np.savez`; the inverse of `from_arrays`."""
        return {
            "root": bytes_array(os.fsencode(self.root)),
            "classes": bytes_array(_joined(self.classes)),
            "names": self.names,
            "offsets": self.offsets,
            "targets": self.targets,
            "sizes": self.sizes,
            "ignored": np.array([self.ignored], dtype=np.int64),
            "fingerprint": bytes_array(self.fingerprint.encode()),
            "times": bytes_array(self.times.encode()),
            "ignored_note": bytes_array(os.fsencode(self.ignored_note)),
            **({} if self.weights is None else {"weights": self.weights}),
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
            ignored_note=os.fsdecode(arrays["ignored_note"].tobytes()) if "ignored_note" in arrays else "",
            weights=arrays.get("weights"),
            shared=arrays if isinstance(arrays, SharedArrays) else None,
        )

    def to_share(self) -> Index:
        """The same index with its arrays in shared memory; itself if they are there already or cannot be shared."""
        if self.shared is not None:
            return self
        shared = SharedArrays.copied({name: getattr(self, name) for name in ARRAYS})
        if shared is None:
            return self
        moved: dict[str, Any] = dict(shared)
        return replace(self, **moved, shared=shared)

    def __getstate__(self) -> dict[str, Any]:
        # Shared memory can be passed on only to a process that is being started.
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
    """Differences between two scans of a split, as relative paths; false if there are none. str() is for messages."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    resized: tuple[str, ...]
    relabelled: tuple[str, ...]  # in words
    classes_changed: bool
    weights_changed: bool = False

    def __bool__(self) -> bool:
        moved = self.added or self.removed or self.resized or self.relabelled
        return bool(moved or self.classes_changed or self.weights_changed)

    def __str__(self) -> str:
        kinds = {"added": self.added, "removed": self.removed, "changed in size": self.resized}
        parts = [
            f"{len(paths)} {kind} ({listed([quoted(path) for path in paths], 3)})"
            for kind, paths in kinds.items()
            if paths
        ]
        if self.relabelled:
            parts.append(relabelled_note(self.relabelled))
        if self.classes_changed:
            parts.append("the list of classes changed")
        if self.weights_changed:
            parts.append("the weights of images changed")
        return "; ".join(parts) or "no difference"


def differences(old: Index, new: Index) -> Differences:
    """Images that were added, removed, or changed in size or label between two scans of the same split."""
    position = {path: i for i, path in enumerate(old.relative_paths())}
    before = np.array([position.pop(path, -1) for path in new.relative_paths()], dtype=np.int64)
    here = np.flatnonzero(before >= 0)
    there = before[here]
    numbers = {name: target for target, name in enumerate(new.classes)}
    labels = np.array([numbers.get(name, -1) for name in old.classes], dtype=np.int64)[old.targets[there]]
    edited = labels != new.targets[here]
    return Differences(
        added=tuple(new.relative_path(i) for i in np.flatnonzero(before < 0).tolist()),
        removed=tuple(os.fsdecode(path) for path in position),
        resized=tuple(new.relative_path(i) for i in here[old.sizes[there] != new.sizes[here]].tolist()),
        relabelled=tuple(
            relabelled(new, i, old.classes[old.targets[k]])
            for i, k in zip(here[edited].tolist(), there[edited].tolist(), strict=True)
        ),
        classes_changed=old.classes != new.classes,
        weights_changed=not np.array_equal(_weights(old)[there], _weights(new)[here]),
    )


def relabelled(index: Index, i: int, before: str) -> str:
    """An image whose label was edited, in words."""
    return f"{quoted(index.relative_path(i))} was {printable(before)}, now {printable(index.classes[index.targets[i]])}"


def relabelled_note(images: Sequence[str]) -> str:
    """How many labels were edited, and which."""
    return f"{len(images):,} {'label' if len(images) == 1 else 'labels'} changed: {listed(images, 3)}"


def _weights(index: Index) -> Array:
    return np.ones(len(index), dtype=np.float32) if index.weights is None else index.weights


def fingerprint_of(classes: Sequence[str], names: Array, offsets: Array, targets: Array, sizes: Array) -> str:
    """The fingerprint of an index with these fields. Checkpoints contain it, so it must never change."""
    digest = hashlib.sha256()
    arrays: list[Array] = [bytes_array(_joined(classes)), np.ascontiguousarray(names)]
    arrays += [np.ascontiguousarray(offsets, dtype="<i8"), np.ascontiguousarray(targets, dtype="<i4")]
    arrays += [np.ascontiguousarray(sizes, dtype="<i8")]
    for part in arrays:
        digest.update(part.nbytes.to_bytes(8, "little"))
        digest.update(part.data)
    return digest.hexdigest()


def gathered(names: Array, offsets: Array, order: Array) -> Array:
    """The concatenated paths `names` in another order, uint8. Some rows at a time, to save memory."""
    lengths = np.diff(offsets)[order]
    found, done = np.empty(int(lengths.sum()), dtype=np.uint8), 0
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows, part = order[start : start + ROWS_AT_ONCE], lengths[start : start + ROWS_AT_ONCE]
        ends = part.cumsum()
        positions = np.arange(ends[-1]) + np.repeat(offsets[rows] - (ends - part), part)
        found[done : done + ends[-1]] = names[positions]
        done += int(ends[-1])
    return found


def bytes_array(data: bytes) -> Array:
    """`data` as a writable array, uint8."""
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def quoted(path: str | Path) -> str:
    """A path in quotes, safe to print: line breaks and bytes that are not UTF-8 are escaped."""
    return repr(str(path))


def _joined(classes: Sequence[str]) -> bytes:
    """The class names, separated by NUL: the only byte that no file name can contain."""
    return os.fsencode("\0".join(classes))
