"""A split of images into train, val and test, for data that has none.

It is stratified by class. Images of a group stay in one split, and so do byte-identical files. The result depends on
the relative paths, the contents, the groups and `data.split`, and on nothing else: not on the order in which a file
system lists files, nor on the number of ranks.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from distil_tl.data.config import SPLITS, SplitConfig
from distil_tl.data.index import Array, Index, quoted
from distil_tl.utils.errors import UserError, listed

TRAIN, VAL, TEST = range(len(SPLITS))  # the codes of the splits
MOST_READ = 100_000  # images whose contents are compared; for more, `distil-tl prepare` does it once
THREADS = 8  # files read in parallel, to hide the latency of a network file system


class Assigned(NamedTuple):
    """The split of each image, uint8 [N], and what there is to say about it, in words."""

    codes: Array
    notes: list[str]


def assign_splits(index: Index, config: SplitConfig, groups: Array | None, *, compare_contents: bool) -> Assigned:
    """Divide the images of an index.

    Args:
        groups: int64 [N], equal for images that must stay in one split; None: by `config.group`.
        compare_contents: whether to look for byte-identical files, which reads those of equal size.

    Raises:
        UserError: `config.group` does not match a path, no image is left for a split, or a file can't be read.
    """
    notes: list[str] = []
    by = "" if groups is None and config.group is None else f", by {config.group or 'group'}"
    test = f" and {config.test:.0%} test" if config.test else ""
    if groups is None and config.group is not None:
        groups = groups_by_path(index, config.group)
    units = np.arange(len(index)) if groups is None else first_of_each(groups)
    if compare_contents:
        same = identical_files([index])
        if same.size:
            copies = first_of_each(same)
            twins = int((np.bincount(copies, minlength=len(index))[copies] > 1).sum())
            notes += [f"{twins:,} byte-identical files stay together"] if twins else []
            units = joined(units, copies)
    else:
        notes.append(f"contents of more than {MOST_READ:,} images are not compared here: distil-tl prepare does that")
    quotas = quotas_of(index.class_counts, config)
    codes = fill(index, units, quotas, config.seed)
    counts = np.stack([np.bincount(index.targets[codes == s], minlength=len(index.classes)) for s in range(3)])
    for split, share in ((VAL, config.val), (TEST, config.test)):
        small = [index.classes[c] for c in np.flatnonzero(counts[split] == 0)] if share else []
        if small and not counts[split].any():
            raise UserError(_none_left_message(index, SPLITS[split], share, groups is not None))
        if small:
            few = "of too few images or groups" if groups is not None else "of too few images"
            notes.append(f"classes {few} for {SPLITS[split]}: {listed([quoted(name) for name in small], 5)}")
    return Assigned(codes, [f"{config.val:.0%} val{test} of each class{by}, seed {config.seed}", *notes])


def _none_left_message(index: Index, split: str, share: float, grouped: bool) -> str:
    few = "too few groups, of which a class needs at least two," if grouped else "too few images"
    return (
        f"{quoted(index.root)} has no split, and each class has {few} for {split} with data.split.{split}={share:g}: "
        f"the largest class has {int(index.class_counts.max())} images. Use a larger share, or add images"
    )


def groups_by_path(index: Index, pattern: str) -> Array:
    """The group of each image, int64 [N]: what a regular expression finds in its relative path.

    That is the text of its groups in parentheses, or of the whole match if it has none.

    Raises:
        UserError: the pattern is not valid, or does not match every path.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may mean something else one day
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"data.split.group={pattern} is not a regular expression: {error}") from None
    known: dict[tuple[str | None, ...] | str, int] = {}
    found = np.empty(len(index), dtype=np.int64)
    missed: list[str] = []
    for i in range(len(index)):
        path = index.relative_path(i)
        match = compiled.search(path)
        if match is None:
            missed.append(quoted(path))
            continue
        found[i] = known.setdefault(match.groups() or match[0], len(known))
    if missed:
        raise UserError(
            f"data.split.group={pattern} is not found in the paths of {len(missed)} of {len(index)} images: "
            f"{listed(missed, 3)}; the first path is {quoted(index.relative_path(0))}"
        )
    return found


def first_of_each(groups: Array) -> Array:
    """For each image the first one of its group, int64 [N]."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return first[inverse]


def joined(one: Array, other: Array) -> Array:
    """Groups, named by their first image, of images that are connected by groups of either kind."""
    labels = np.arange(len(one))
    while True:
        before = labels
        for groups in (one, other):
            smallest = np.full(len(labels), len(labels))
            np.minimum.at(smallest, groups, labels)
            labels = smallest[groups]
        if np.array_equal(labels, before):
            return labels


def identical_files(indexes: Sequence[Index]) -> Array:
    """A number for each image of all indexes, int64 [N], equal for files with equal content; empty if there are none.

    Only files of which another one has the same size are read. Empty files are not compared: they are no images.
    """
    sizes = np.concatenate([index.sizes for index in indexes])
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero((counts[inverse] > 1) & (sizes > 0))
    if not len(candidates):
        return np.empty(0, dtype=np.int64)
    ends = np.cumsum([len(index) for index in indexes])
    places = [(int(of), int(i - ends[of] + len(indexes[of]))) for i, of in
              zip(candidates, np.searchsorted(ends, candidates, side="right"), strict=True)]  # fmt: skip
    found, known = np.arange(len(sizes)), dict[bytes, int]()
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda place: _digest(indexes[place[0]], place[1]), places)
        for i, digest in zip(candidates.tolist(), digests, strict=True):
            found[i] = known.setdefault(digest, i)
    return found


def _digest(index: Index, i: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with index.path(i).open("rb", buffering=0) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"can't read the image {quoted(index.path(i))}: {error.strerror or error}") from error
    return digest.digest()


def quotas_of(counts: Array, config: SplitConfig) -> Array:
    """Number of images of each class for train, val and test, int64 [3, C]. Train has at least one of each class."""
    wanted = [np.floor(counts * share + 0.5).astype(np.int64) for share in (config.val, config.test)]
    val = np.minimum(wanted[0], np.maximum(0, counts - 1))
    test = np.minimum(wanted[1], np.maximum(0, counts - 1 - val))
    return np.stack([counts - val - test, val, test])


def fill(index: Index, units: Array, quotas: Array, seed: int) -> Array:
    """The split of each image, uint8 [N], so that each class has about its quota.

    Args:
        units: int64 [N], for each image the first one of those that must stay together.
        quotas: int64 [3, C], of images.
    """
    codes = np.zeros(len(index), dtype=np.uint8)
    left = quotas.astype(np.int64).copy()
    size = np.bincount(units, minlength=len(index))
    together = size[units] > 1
    order = keyed_order(index, seed)
    if together.any():
        _fill_with_groups(index.targets, units, together, order, quotas, left, codes)
    single = np.flatnonzero(~together)
    single = single[np.lexsort((order[single], index.targets[single]))]
    targets = index.targets[single]
    counts = np.bincount(targets, minlength=quotas.shape[1])
    rank = np.arange(len(single)) - np.repeat(counts.cumsum() - counts, counts)  # within the class
    # Groups may have used more than the quota of a split; train keeps an image of each class in any case.
    in_train = np.bincount(index.targets[together & (codes == TRAIN)], minlength=quotas.shape[1])
    most = np.maximum(0, counts - (in_train == 0))
    val = np.clip(left[VAL], 0, most)
    test = np.clip(left[TEST], 0, most - val)
    codes[single[rank < (val + test)[targets]]] = TEST
    codes[single[rank < val[targets]]] = VAL
    return codes


def _fill_with_groups(
    targets: Array, units: Array, together: Array, order: Array, quotas: Array, left: Array, codes: Array
) -> None:  # seven arrays of one algorithm, which a class would only rename
    """Assign the images that must stay together, large groups first, to the split that lacks them most.

    `left` and `codes` are updated. Groups of about the same size come in the order of `order`, by the seed.
    """
    rows = np.flatnonzero(together)
    rows = rows[np.argsort(units[rows], kind="stable")]
    first, starts = np.unique(units[rows], return_index=True)
    members = np.split(rows, starts[1:])
    magnitude = np.array([len(rows).bit_length() for rows in members])
    in_train = quotas.sum(axis=0)  # if no more groups leave it
    for number in np.lexsort((order[first], -magnitude)).tolist():
        classes, counts = np.unique(targets[members[number]], return_counts=True)
        best, best_cost = TRAIN, _cost(left[TRAIN, classes], counts, quotas[TRAIN, classes])
        for split in (VAL, TEST):
            quota = quotas[split, classes]
            if not quota.any() or (in_train[classes] <= counts).any():
                continue
            cost = _cost(left[split, classes], counts, quota)
            if cost < best_cost:
                best, best_cost = split, cost
        codes[members[number]] = best
        left[best, classes] -= counts
        if best != TRAIN:
            in_train[classes] -= counts


def _cost(left: Array, counts: Array, quota: Array) -> float:
    """The change of the squared distance to the quotas, relative to them, if `counts` images are added."""
    return float((((left - counts) ** 2 - left**2) / np.maximum(1, quota)).sum())


def keyed_order(index: Index, seed: int) -> Array:
    """A pseudo-random number for each image, uint64 [N], that depends on its relative path and the seed alone."""
    keys = bytearray()
    for path in index.relative_paths():
        keys += path_key(path, seed)
    return np.frombuffer(keys, dtype="<u8")


def path_key(path: bytes, seed: int) -> bytes:
    """The number of `keyed_order` for one path, as 8 bytes."""
    return hashlib.blake2b(path, digest_size=8, key=b"split %d" % (seed % 2**64)).digest()
