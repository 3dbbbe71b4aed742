"""The images: splits and classes, and whether a few of them can be decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distil_tl.data.config import MORE_EXTENSIONS, SPLITS, DataConfig, is_divided, root_problems
from distil_tl.data.decode import ImageError, decode, decoder_name
from distil_tl.data.find_splits import balance_hint, find_splits
from distil_tl.data.index import Index
from distil_tl.data.intensity import intensity_warning
from distil_tl.data.local_folder import StagingError, expand
from distil_tl.data.pixels import refuse_missing_decoders
from distil_tl.data.scan import scan
from distil_tl.doctor.lines import FAIL, WARN, Report, first_line, name_ranks, size
from distil_tl.utils.auto import AUTO
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import cache_dir
from distil_tl.utils.import_path import is_installed
from distil_tl.utils.log import printable
from distil_tl.utils.threads import available_cpus

if TYPE_CHECKING:
    from distil_tl.doctor.facts import Facts

GROUP = "data"
SAMPLE = 16  # images of each split that are decoded
DIGITS = 10  # classes of the demo


@dataclass
class ImagesFound:
    """The splits that could be read.

    Attributes:
        classes: number of classes; None if it is unknown.
        images: by split.
        bytes: of all files.
        decode_all: whether all images are decoded, or a few.
        indexes: of the splits; empty unless all of them could be read.
        failed: whether some could not be read.
    """

    classes: int | None = None
    images: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    indexes: dict[str, Index] = field(default_factory=dict)
    decode_all: bool = False
    failed: bool = False

    def add(self, split: str, index: Index) -> None:
        self.classes = len(index.classes) if split == "train" else self.classes
        self.images[split], self.bytes = len(index), self.bytes + int(index.sizes.sum())


def look_at_images(report: Report, config: DataConfig, min_side: int | None, found: ImagesFound, run_dir: Path) -> None:
    """Scan the splits as training does, and decode a few images of each. Fills in `found`.

    Args:
        run_dir: of the run, which may have a split already.
        min_side: length in pixels that a decoded image needs; None: decode in full.
    """
    try:
        refuse_missing_decoders(config)
        names = {decoder_name(kind) for kind in ("JPEG", *(MORE_EXTENSIONS[name] for name in config.extensions))}
        report.ok(GROUP, "decoders", ", ".join(sorted(names, reverse=True)))
    except UserError as error:
        report.fail(GROUP, "decoders", str(error))
    root = _root(report, config, found)
    if root is None:
        return
    if is_divided(config, root) and not any(root_problems(config, None)):
        found.indexes = _look_at_divided(report, config, root, min_side, found, run_dir)
    else:
        found.indexes = _look_at_folders(report, config, root, min_side, found)
    train = found.indexes.get("train")
    if train is not None and config.global_batch_size != AUTO and len(train) < config.global_batch_size:
        report.fail(
            GROUP, "train", f"{train.root} has {len(train)} images{' in train' if train.root == root else ''}, fewer "
            f"than one global batch; set data.global_batch_size to at most {len(train)}, or to auto",
        )  # fmt: skip
    if train is not None and (hint := balance_hint(train, config.balance)):
        report.warn(GROUP, "train", hint)
    if found.failed or not {"train", "val"} <= found.indexes.keys():
        found.indexes = {}


def _look_at_folders(
    report: Report, config: DataConfig, root: Path, min_side: int | None, found: ImagesFound
) -> dict[str, Index]:
    """Scan the folders of the splits."""
    indexes = dict[str, Index]()
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():  # a missing train or val is a problem of the configuration, and named there
            continue
        began = time.monotonic()
        try:
            classes = indexes["train"].classes if "train" in indexes else None
            index = scan(folder, classes=classes, extensions=config.image_extensions)
        except UserError as error:
            report.fail(GROUP, split, str(error))
            found.failed = True
            continue
        indexes[split] = index
        found.add(split, index)
        _describe(report, split, index, f"; scanned in {time.monotonic() - began:.1f} s, as at each start of a run")
        _decode_some(report, config, split, index, min_side, found)
    return indexes


def _look_at_divided(
    report: Report, config: DataConfig, root: Path, min_side: int | None, found: ImagesFound, run_dir: Path
) -> dict[str, Index]:  # six values that its caller has
    """Scan a folder of classes and divide it, as training does."""
    began = time.monotonic()
    try:
        indexes, note = find_splits(config, root, run_dir)
    except UserError as error:
        report.fail(GROUP, "data.root" if config.labels is None else "data.labels", str(error))
        found.failed = True
        return {}
    report.ok(
        GROUP, "split", f"{printable(note)}; scanned in {time.monotonic() - began:.1f} s, as at each start of a run"
    )
    for split, index in indexes.items():
        found.add(split, index)
        _describe(report, split, index, "")
        _decode_some(report, config, split, index, min_side, found)
    return indexes


def _root(report: Report, config: DataConfig, found: ImagesFound) -> Path | None:
    """The folder to scan; None if there is none yet. Nothing is written."""
    if config.root is not None:
        root = Path(config.root)
        if root.is_file():
            report.ok(GROUP, "data.root", f"{root}, a tar file of {size(root.stat().st_size)}, is unpacked when a run "
                      f"starts; its images are not looked at")  # fmt: skip
        return root if root.is_dir() else None
    found.classes = DIGITS
    folder = cache_dir() / "digits-v1"
    if folder.is_dir():
        report.ok(GROUP, "data.root", f"none given: the embedded digits, {folder}")
        return folder
    if not is_installed("sklearn"):
        report.fail(GROUP, "data.root", "none given, and the embedded digits need scikit-learn: give data.root, or "
                    "pip install 'distil_tl[demo]'")  # fmt: skip
    else:
        report.ok(GROUP, "data.root", f"none given: the embedded digits, which are written to {folder} when needed")
    return None


def _describe(report: Report, split: str, index: Index, more: str) -> None:
    notes = f", {index.ignored} other files ignored" if index.ignored else ""
    report.ok(
        GROUP, split, f"{len(index):,} images of {len(index.classes)} classes, {size(int(index.sizes.sum()))}{notes}"
        f"{more}",
    )  # fmt: skip
    if index.missing:
        report.warn(
            GROUP, split, f"no images of {', '.join(map(printable, index.missing[:8]))}"
            f"{f' and {len(index.missing) - 8} more classes' if len(index.missing) > 8 else ''}: their figures will be "
            f"missing; is that intended?",
        )  # fmt: skip


def _decode_some(
    report: Report, config: DataConfig, split: str, index: Index, min_side: int | None, found: ImagesFound
) -> None:
    """Decode all images, or some from the whole range of the index, so from as many classes as possible."""
    count = len(index) if found.decode_all else min(SAMPLE, len(index))
    chosen = np.unique(np.linspace(0, len(index) - 1, count).astype(int)).tolist()
    seconds = []

    def attempt(i: int) -> float | Exception:
        began = time.monotonic()
        try:
            decode(index.path(i), min_side=min_side, intensity=config.intensity)
        except (ImageError, OSError) as error:
            return error
        return time.monotonic() - began

    with ThreadPoolExecutor(available_cpus() if found.decode_all else 1) as pool:
        for i, result in zip(chosen, pool.map(attempt, chosen), strict=True):
            if isinstance(result, float):
                seconds.append(result)
            elif isinstance(result, ImageError):
                status, remedy = (FAIL, "repair or remove it, or set data.on_bad_image=skip")
                if config.on_bad_image == "skip":
                    status, remedy = WARN, "it is skipped, as data.on_bad_image says"
                path = printable(index.path(i))
                report.add(GROUP, split, status, f"{path} can't be used: {result.reason}; {remedy}")
            else:
                reason = getattr(result, "strerror", None) or result
                report.fail(GROUP, split, f"{printable(index.path(i))} can't be read: {reason}; correct its "
                            f"permissions, or the disk")  # fmt: skip
    if seconds:
        report.ok(
            GROUP, f"{split}, decoded", f"{len(seconds)} of {len(chosen)} images tried, "
            f"{1000 * float(np.median(seconds)):.1f} ms each: about {1 / max(1e-6, float(np.median(seconds))):,.0f} "
            f"images/s for each loader process, without augmentation",
        )  # fmt: skip
    if warning := intensity_warning(len(index), index.path, config.intensity):
        report.warn(GROUP, split, warning)


def stage_folder(stage_to: str | None) -> tuple[str | None, str | None]:
    """The folder that `data.stage_to` means on this node, and why it can't be told."""
    if stage_to is None:
        return None, None
    try:
        return str(expand(stage_to)), None
    except StagingError as error:
        return None, first_line(error)


def judge_pixels(report: Report, facts: Sequence[Facts]) -> None:
    """A line for each format of which ranks decode the reference images to different pixels."""
    for name in dict.fromkeys(name for each in facts for name in each.pixels):
        ranks_of: dict[str, list[int]] = {}
        for each in facts:
            if name in each.pixels:  # else the reason is in `failed`
                ranks_of.setdefault(each.pixels[name], []).append(each.rank)
        if len(ranks_of) > 1:
            groups = " and ".join(
                f"{name_ranks(ranks)}{'' if found else ' (no decoder)'}" for found, ranks in ranks_of.items()
            )
            report.fail(
                GROUP, "decoders", f"{groups} would decode {name} images to different pixels; use the same Python "
                f"environment, or install the same versions, on all nodes",
            )  # fmt: skip
