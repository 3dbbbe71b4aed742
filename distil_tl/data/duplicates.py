"""Images that are in more than one split: byte-identical ones, and those that look almost alike.

How an image looks is described by the perceptual hash of the package imagehash: 64 bits, of which similar images
differ in few. Each image of val and test is compared with all of the splits before it.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from distil_tl.data.decode import ImageError, decode
from distil_tl.data.index import Array, Index
from distil_tl.data.loader_processes import BoundedLoader
from distil_tl.data.split import identical_files
from distil_tl.utils.csv_rows import CsvWriter
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_parts
from distil_tl.utils.log import Progress, logger, printable

NEAR = 4  # of 64 bits, in which two images that count as similar may differ
BANDS = np.linspace(0, 64, NEAR + 2).astype(int)  # two such hashes have at least one of these parts in common
PAIRS_AT_ONCE = 1 << 22
MOST_SHOWN = 10
COLUMNS = ["kind", "bits", "split", "path", "other_split", "other_path"]
_ONES = np.array([bin(i).count("1") for i in range(1 << 16)], dtype=np.uint8)


class Duplicate(NamedTuple):
    """An image, and one of an earlier split that is the same (`bits` is None), or looks alike."""

    bits: int | None
    split: str
    image: int
    other_split: str
    other: int


def identical_across(splits: Mapping[str, Index]) -> list[Duplicate]:
    """For each image with an identical file in an earlier split, the first one there."""
    numbers = identical_files(list(splits.values()))
    if not numbers.size:
        return []
    found, known, start = [], dict[int, tuple[str, int]](), 0
    for split, index in splits.items():
        of_split = numbers[start : start + len(index)].tolist()
        start += len(index)
        found += [Duplicate(None, split, i, *known[n]) for i, n in enumerate(of_split) if n in known]
        for i, number in enumerate(of_split):
            known.setdefault(number, (split, i))
    return found


def similar_across(splits: Mapping[str, Index], workers: int) -> list[Duplicate]:
    """For each image that looks like one of an earlier split, the most similar one there."""
    names, hashes = list(splits), list[Array]()
    found = []
    for position, split in enumerate(names):
        own = perceptual_hashes(splits[split], workers, split)
        best: dict[int, Duplicate] = {}
        for before, other in zip(names[:position], hashes, strict=True):
            for i, j, bits in nearest(own, other).tolist():
                if i not in best or bits < (best[i].bits or 0):
                    best[i] = Duplicate(bits, split, i, before, j)
        found += [best[i] for i in sorted(best)]
        hashes.append(own)
    return found


class _Hashes(Dataset["int | None"]):
    """The perceptual hash of each image; None for one that can't be decoded."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.hash: Any = importlib.import_module("imagehash").phash

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> int | None:
        try:
            pixels = decode(self.index.path(i), min_side=64).permute(1, 2, 0).numpy()
        except (ImageError, OSError):
            return None
        bits = np.packbits(self.hash(Image.fromarray(pixels)).hash.ravel())
        return int.from_bytes(bits.tobytes(), "big")


def perceptual_hashes(index: Index, workers: int, split: str) -> Array:
    """uint64 [N, 2]: the hash of each image that can be decoded, and its position in the index."""
    rows, at = [], 0
    loader: Iterable[list[int | None]] = BoundedLoader(
        _Hashes(index), batch_size=64, num_workers=workers, collate_fn=list,
    )  # fmt: skip
    with Progress(f"similar images in {split}", len(index), show=True) as bar:
        for some in loader:
            rows += [(value, at + i) for i, value in enumerate(some) if value is not None]
            at += len(some)
            bar.advance(len(some))
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


def nearest(own: Array, other: Array) -> Array:
    """For each hash of `own` with similar ones in `other`, the most similar: int64 [M, 3], positions and bits."""
    values, first = np.unique(other[:, 0], return_index=True)
    best = np.full(len(own), NEAR + 1)
    choice = np.zeros(len(own), dtype=np.int64)
    for low, high in zip(BANDS[:-1].tolist(), BANDS[1:].tolist(), strict=True):
        mask, shift = np.uint64((1 << (high - low)) - 1), np.uint64(low)
        parts, wanted = (values >> shift) & mask, (own[:, 0] >> shift) & mask
        order = np.argsort(parts, kind="stable")
        begin = np.searchsorted(parts[order], wanted, side="left")
        counts = np.searchsorted(parts[order], wanted, side="right") - begin
        for rows in _pieces(counts):
            n = counts[rows]
            of = np.repeat(np.arange(len(n)), n)
            candidates = order[np.arange(len(of)) - np.repeat(n.cumsum() - n, n) + np.repeat(begin[rows], n)]
            bits = different_bits(own[rows, 0][of], values[candidates])
            by_distance = np.lexsort((candidates, bits, of))
            one, where = np.unique(of[by_distance], return_index=True)
            closest = by_distance[where]
            better = bits[closest] < best[rows.start + one]
            best[rows.start + one[better]] = bits[closest][better]
            choice[rows.start + one[better]] = first[candidates[closest]][better]
    similar = np.flatnonzero(best <= NEAR)
    positions = own[similar, 1], other[choice[similar], 1]
    return np.stack([*(p.astype(np.int64) for p in positions), best[similar]], axis=1)


def _pieces(counts: Array) -> list[slice]:
    """Consecutive rows with at most PAIRS_AT_ONCE pairs together, or one row."""
    ends, pieces, start = counts.cumsum(), [], 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
        pieces.append(slice(start, end))
        start = end
    return pieces


def different_bits(one: Array, other: Array) -> Array:
    """The number of bits in which hashes differ, int64 [N]."""
    found: Array = _ONES[(one ^ other)[:, None].view(np.uint16)].sum(axis=1, dtype=np.int64)
    return found


def report_duplicates(splits: Mapping[str, Index], file: Path, workers: int) -> None:
    """Look for duplicates across the splits, log them, and write them to `file`.

    Raises:
        UserError: an image can't be read, or the file can't be written.
    """
    found = identical_across(splits)
    known = {(each.split, each.image) for each in found}
    if importlib.util.find_spec("imagehash") is None:
        logger.info("similar images are not looked for: pip install 'distil_tl[duplicates]'")
    else:
        found += [each for each in similar_across(splits, workers) if (each.split, each.image) not in known]
    identical = sum(each.bits is None for each in found)
    if not found:
        logger.info("no image is in two splits")
        return
    for each in found[:MOST_SHOWN]:
        kind = "is identical to" if each.bits is None else "looks like"
        logger.info("  %s %s %s", _shown(splits, each.split, each.image), kind,
                    _shown(splits, each.other_split, each.other))  # fmt: skip
    try:
        write_parts(file, [_table(splits, found)])
    except OSError as error:
        raise UserError(f"can't write {printable(file)}: {error.strerror or error}") from error
    logger.warning(
        "images that another split has as well: %s identical files, and %s that look alike (at most %d bits of 64 "
        "differ). Results on them may be too good. All are in %s",
        f"{identical:,}", f"{len(found) - identical:,}", NEAR, printable(file),
    )  # fmt: skip


def _shown(splits: Mapping[str, Index], split: str, image: int) -> str:
    return printable(f"{splits[split].relative_path(image)} of {split}")


def _table(splits: Mapping[str, Index], found: list[Duplicate]) -> bytes:
    text = io.StringIO()
    writer = CsvWriter(text)
    writer.writerow(COLUMNS)
    for bits, split, image, other_split, other in found:
        kind = "identical" if bits is None else "similar"
        paths = splits[split].relative_path(image), splits[other_split].relative_path(other)
        writer.writerow([kind, 0 if bits is None else bits, split, paths[0], other_split, paths[1]])
    return os.fsencode(text.getvalue())
