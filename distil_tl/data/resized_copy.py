"""A copy of an image folder with its large images made smaller, so that training reads it faster.

An interrupted copy is resumed. Files that can't be decoded are copied unchanged and listed in prepared.json: the copy
has as many images as the original, and `data.on_bad_image` applies to both alike.
"""

from __future__ import annotations

import collections
import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distil_tl.data.config import DataConfig, is_divided
from distil_tl.data.decode import ImageError, read_size
from distil_tl.data.index import Index
from distil_tl.data.loader_processes import BoundedLoader
from distil_tl.data.pixels import unusual_pixels
from distil_tl.data.resize import TEMPORARY, Outcome, ShrinkDataset
from distil_tl.data.scan import scan
from distil_tl.data.transforms import min_crop_side
from distil_tl.utils.errors import PreemptedError, UserError, listed
from distil_tl.utils.files import read_json, write_json
from distil_tl.utils.log import Progress, logger, printable
from distil_tl.utils.version import __version__

MANIFEST = "prepared.json"
SAMPLE = 200  # images whose headers are read to estimate the size of the copy


@dataclass
class Manifest:
    """The content of prepared.json. Until it is complete it may list bad images that are not copied yet."""

    settings: dict[str, Any]  # must be equal for a copy to be resumed
    path: Path
    bad: dict[str, dict[str, str]] = field(default_factory=dict)  # split: {relative path: why it can't be decoded}
    notes: collections.Counter[str] = field(default_factory=collections.Counter)  # on values with more than 8 bits

    def write(self, **more: Any) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"complete": False, **self.settings, **more, "bad": self.bad})
        except OSError as error:
            raise UserError(f"can't write {printable(self.path)}: {error.strerror or error}") from error


def copy_resized(
    config: DataConfig, splits: dict[str, Index], out: Path, *, resize: int | None, quality: int, workers: int
) -> None:
    """Copy the images of `splits` to `out`, or resume such a copy.

    Args:
        config: of the images.
        out: a resolved path, which does not contain the images and is not among them.
        resize: maximum shorter side in pixels; None: all images are copied unchanged.
        quality: of JPEGs, 1 to 100.
        workers: processes.

    Raises:
        UserError: `out` holds something else, the disk is too full, a class has no name for a folder, or a file can't
            be read or written.
        PreemptedError: Ctrl-C; what is written stays.
    """
    for split, index in splits.items():
        if index.ignored_note:
            logger.info("%s: not copied: %s", split, printable(index.ignored_note))
    settings = {
        "version": 1,
        "source": {split: index.fingerprint for split, index in splits.items()},
        "resize": resize,
        "quality": quality,
        **(
            {"split": asdict(config.split)} if config.root is not None and is_divided(config, Path(config.root)) else {}
        ),
        **({"pixels": pixels} if (pixels := unusual_pixels(config)) else {}),
    }
    datasets = {split: ShrinkDataset(index, out / split, resize, quality) for split, index in splits.items()}
    refuse_class_names(datasets["train"])
    manifest = open_manifest(out, settings, splits)
    if not is_complete(out, splits, config.image_extensions):
        manifest.write()
        make_folders(datasets)
        done = copy_images(datasets, manifest, workers)
        copies = finish(out, splits, manifest, config.image_extensions)
        logger.info("resized: %s; copied unchanged: %s; already done: %s",
                    f"{done['resized']:,}", f"{done['copied']:,}", f"{done['there']:,}")  # fmt: skip
        for note, count in sorted(manifest.notes.items()):
            logger.info("%s %s", f"{count:,}", note)
        for split, index in splits.items():
            before, after = int(index.sizes.sum()), int(copies[split].sizes.sum())
            logger.info("%s: %s images, %s MB became %s MB", split, f"{len(index):,}", _mb(before), _mb(after))
    log_next_steps(out, manifest, resize)


def open_manifest(out: Path, settings: dict[str, Any], splits: dict[str, Index]) -> Manifest:
    """The manifest of the copy to resume in `out`, or of a new one.

    Raises:
        UserError: `out` holds something else, or the disk is too full.
    """
    manifest = Manifest(settings, out / MANIFEST)
    if not manifest.path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out {printable(out)} holds other files; choose a new or an empty folder")
        check_space(out, splits["train"], settings["resize"], sum(int(index.sizes.sum()) for index in splits.values()))
        return manifest
    try:
        saved = read_json(manifest.path)
        manifest.bad = {split: dict(bad) for split, bad in saved["bad"].items()}
        changed = [key for key in ("version", "source", "resize", "quality") if saved[key] != settings[key]]
        split = [f"--{k}={v}" for k, v in saved.get("split", {}).items() if settings.get("split", {}).get(k) != v]
        same_pixels = saved.get("pixels") == settings.get("pixels")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"{printable(manifest.path)} can't be read; delete {printable(out)}, or choose another --out"
        ) from None
    if changed:
        what = f"with another {' and '.join(f'--{k}' for k in changed)}"
        if "source" in changed:
            what = f"with {' '.join(split)}" if split else "from other images"
        raise UserError(f"{printable(out)} was made {what}; delete it, or choose another --out")
    if not same_pixels:
        raise UserError(
            f"{printable(out)} was made with an image decoder that gives other pixels than the one now installed; "
            f"install the same again, delete the copy, or choose another --out"
        )
    return manifest


def check_space(out: Path, index: Index, resize: int | None, total: int) -> None:
    """Estimate the size of the copy from some image headers. Warn when a copy will hardly help.

    Args:
        index: a split to take the sample from.
        total: bytes of all splits.

    Raises:
        UserError: the disk has too little space.
    """
    sampled, larger, before, after = 0, 0, 1, 1.0
    for i in np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(int)).tolist() if resize else []:
        with suppress(ImageError, OSError):
            shorter = min(read_size(index.path(i)))
            sampled, larger = sampled + 1, larger + (shorter > (resize or 0))
            before += int(index.sizes[i])
            after += int(index.sizes[i]) * min(1.0, (resize or 0) / shorter) ** 2
    if resize is not None and not sampled:
        return
    needed, existing = int(total * after / before), out
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"the copy will take about {_mb(needed)} MB, but {printable(existing)} has {_mb(free)} MB free")
    logger.info("the copy will take about %s MB, %s MB are free", _mb(needed), _mb(free))
    if resize is not None and larger < sampled / 2:
        logger.warning(
            "of %d sampled images, %d have a shorter side of more than %d pixels: a copy will hardly be faster to read",
            sampled, larger, resize,
        )  # fmt: skip


def refuse_class_names(dataset: ShrinkDataset) -> None:
    """Raises UserError if labels of a table can't be the names of folders."""
    names = [folder[:-1] for folder in dataset.folders]
    odd = [name for name in names if "/" in name or name.startswith(".") or len(name.encode()) > 255]
    if odd:
        raise UserError(
            f"the labels {listed([repr(name) for name in odd], 5)} can't be names of folders: rename them, or write "
            f"only a table, as in --out split.csv"
        )


def make_folders(datasets: dict[str, ShrinkDataset]) -> None:
    for dataset in datasets.values():
        for folder in sorted({os.path.dirname(dataset.target(i)) for i in range(len(dataset))}):  # noqa: PTH120
            path = dataset.out / folder
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"can't create the folder {printable(path)}: {error.strerror}") from error
            if path.resolve() != path:
                raise UserError(f"{printable(path)} is a symbolic link to another place; remove it")


def copy_images(datasets: dict[str, ShrinkDataset], manifest: Manifest, workers: int) -> collections.Counter[str]:
    """Write the images that are missing. Returns how many were resized, copied, and there already."""
    done: collections.Counter[str] = collections.Counter()
    total = sum(len(dataset) for dataset in datasets.values())
    bar = Progress("prepare", total, show=True)
    tenth = 1
    try:
        for split, dataset in datasets.items():
            loader = BoundedLoader[list[Outcome]](dataset, batch_size=8, num_workers=workers, collate_fn=list)
            for outcomes in loader:
                for outcome in outcomes:
                    done[settle(outcome, split, dataset, manifest)] += 1
                bar.advance(len(outcomes))
                if done.total() * 10 >= tenth * total:
                    bar.show(f"{done.total():,} of {total:,} images")
                    tenth = done.total() * 10 // total + 1
    except KeyboardInterrupt:
        raise PreemptedError(
            f"stopped after {done.total():,} of {total:,} images; run the same command to resume"
        ) from None
    finally:
        bar.close()
    return done


def settle(outcome: Outcome, split: str, dataset: ShrinkDataset, manifest: Manifest) -> str:
    """What was done with an image. A bad one is copied here, after the manifest lists it.

    Raises:
        UserError: a file can't be read or written.
    """
    if outcome.fault:
        name = dataset.target(outcome.index)
        logger.warning("can't be decoded, copied unchanged: %s: %s", printable(dataset.index.path(outcome.index)),
                       printable(outcome.fault))  # fmt: skip
        manifest.bad.setdefault(split, {})[name] = outcome.fault
        manifest.write()
        outcome = dataset.copy(outcome.index)
    if outcome.note:
        manifest.notes[outcome.note] += 1
    if outcome.error:
        raise UserError(f"can't read or write {printable(outcome.error)}; run the same command to resume")
    return outcome.done


def finish(out: Path, splits: dict[str, Index], manifest: Manifest, extensions: tuple[str, ...]) -> dict[str, Index]:
    """Scan the copy as training will, and mark the manifest complete.

    Raises:
        UserError: a split of the copy does not have as many images as the original.
    """
    for split in splits:
        for folder, _, names in os.walk(out / split):
            for name in names:
                if re.fullmatch(TEMPORARY, name):
                    Path(folder, name).unlink(missing_ok=True)
    os.sync()
    copies = {split: scan(out / split, classes=index.classes, extensions=extensions) for split, index in splits.items()}
    for split, index in splits.items():
        if len(copies[split]) != len(index):
            raise UserError(
                f"{printable(out / split)} has {len(copies[split]):,} images, the original has {len(index):,}: "
                f"another program writes there; delete the copy and prepare it again"
            )
    manifest.write(
        complete=True,
        copy={split: index.fingerprint for split, index in copies.items()},
        images={split: len(index) for split, index in copies.items()},
        bytes_before=sum(int(index.sizes.sum()) for index in splits.values()),
        bytes_after=sum(int(index.sizes.sum()) for index in copies.values()),
        distil_tl=__version__,
    )
    return copies


def is_complete(out: Path, splits: dict[str, Index], extensions: tuple[str, ...]) -> bool:
    """Whether an earlier call has finished the copy, and its files have not changed since."""
    try:
        saved = read_json(out / MANIFEST)
        return bool(saved["complete"]) and all(
            scan(out / split, classes=index.classes, extensions=extensions).fingerprint == saved["copy"][split]
            for split, index in splits.items()
        )
    except (OSError, ValueError, KeyError, UserError):
        return False


def log_next_steps(out: Path, manifest: Manifest, resize: int | None) -> None:
    bad = sum(map(len, manifest.bad.values()))
    if bad:
        logger.info("bad images: %d, listed in %s; data.on_bad_image says what training does with them", bad,
                    printable(manifest.path))  # fmt: skip
    if resize is not None:
        sizes = (int(resize * min_crop_side(augment)) for augment in ("light", "strong"))
        logger.info("no crop is enlarged up to data.image_size=%d with data.augment=light, %d with strong", *sizes)
    logger.info("train on the copy with  data.root=%s", printable(shlex.quote(str(out))))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"
