"""`distil-tl prepare ROOT --out DIR --resize N`: a copy of an image folder that is read faster.

Images whose shorter side has more than N pixels are made smaller, by all CPUs. The same command goes on where it was
stopped. What can't be decoded is copied as it is and listed, so that the copy has the images that the folder has, and
`data.on_bad_image` decides about them as before.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from distil_tl.data.config import SPLITS
from distil_tl.data.decode import ImageError, read_size
from distil_tl.data.index import Index
from distil_tl.data.loader import ignore_signals
from distil_tl.data.resize import TEMPORARY, Outcome, ShrinkDataset
from distil_tl.data.scan import scan
from distil_tl.data.transforms import closest_crop
from distil_tl.distributed.process_group import available_cpus
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import PreemptedError, UserError
from distil_tl.utils.files import write_json
from distil_tl.utils.log import Progress, logger, printable, setup_console
from distil_tl.utils.version import __version__

MANIFEST = "prepared.json"
SAMPLE = 200  # images whose headers are read to foretell what a copy will be


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl prepare",
        description="Copy an image folder with its large images made smaller, so that training reads it faster.",
    )
    parser.add_argument("root", type=Path, help="a folder with train/CLASS/*.jpg, and val and test if there")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the copy; new, empty or begun before")
    parser.add_argument("--resize", type=int, required=True, metavar="N", help="longest shorter side, in pixels")
    parser.add_argument("--quality", type=int, default=95, help="of JPEGs, 1 to 100 (default: 95)")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes (default: all CPUs)")
    return run_command("distil-tl prepare", lambda: prepare(parser.parse_args(args)))


@dataclass
class Manifest:
    """What prepared.json says. It may hold more images than are there until it is complete."""

    settings: dict[str, Any]  # what must be the same for a copy to be gone on with
    path: Path
    bad: dict[str, dict[str, str]] = field(default_factory=dict)  # by split and name, why it is no image

    def write(self, **more: Any) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"complete": False, **self.settings, **more, "bad": self.bad})
        except OSError as error:
            raise UserError(f"can't write {printable(self.path)}: {error.strerror or error}") from error


def prepare(options: argparse.Namespace) -> None:
    """Make the copy, or go on with it, as `options` (see `main`) say.

    Raises:
        UserError: nothing there to copy, a place that holds something else, a file that can't be read or written.
        PreemptedError: Ctrl-C; what is written stays.
    """
    setup_console(True)
    root, out = _places(options)
    splits = _scan(root)
    settings = {
        "version": 1,
        "source": {split: index.fingerprint for split, index in splits.items()},
        "resize": options.resize,
        "quality": options.quality,
    }
    manifest = _begin(out, settings, splits)
    if not _is_complete(out, splits):
        manifest.write()
        _make_folders(out, splits)
        done = _shrink_all(splits, out, manifest, options)
        copies = _finish(out, splits, manifest)
        logger.info("resized: %s; copied as they were: %s; there before: %s",
                    f"{done['resized']:,}", f"{done['copied']:,}", f"{done['there']:,}")  # fmt: skip
        for split, index in splits.items():
            before, after = int(index.sizes.sum()), int(copies[split].sizes.sum())
            logger.info("%s: %s images, %s MB became %s MB", split, f"{len(index):,}", _mb(before), _mb(after))
    _say_how_to_go_on(out, manifest, options.resize)


def _places(options: argparse.Namespace) -> tuple[Path, Path]:
    problems = []
    if options.resize < 8:
        problems.append("--resize must be at least 8 pixels")
    if not 1 <= options.quality <= 100:
        problems.append("--quality must be 1 to 100")
    if options.workers < 0:
        problems.append("--workers must be 0 or more")
    root, out = options.root.resolve(), options.out.resolve()
    if out.is_relative_to(root) or root.is_relative_to(out):
        problems.append(f"--out {printable(options.out)} and {printable(options.root)} lie in each other")
    if out.exists() and not out.is_dir():
        problems.append(f"--out {printable(options.out)} is not a folder")
    if problems:
        raise UserError("; ".join(problems))
    return root, out


def _scan(root: Path) -> dict[str, Index]:
    splits = {"train": scan(root / "train")}
    for split in SPLITS[1:]:
        if (root / split).is_dir():
            splits[split] = scan(root / split, classes=splits["train"].classes)
    return splits


def _begin(out: Path, settings: dict[str, Any], splits: dict[str, Index]) -> Manifest:
    """What an earlier call has left in `out`, or a new one.

    Raises:
        UserError: something else is there, or too little room.
    """
    manifest = Manifest(settings, out / MANIFEST)
    if not manifest.path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out {printable(out)} holds other things; choose a new or an empty folder")
        _foretell(out, splits["train"], settings["resize"], sum(int(index.sizes.sum()) for index in splits.values()))
        return manifest
    try:
        found = json.loads(manifest.path.read_text())
        manifest.bad = {split: dict(bad) for split, bad in found["bad"].items()}
        changed = [key for key in settings if found[key] != settings[key]]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"{printable(manifest.path)} can't be read; delete {printable(out)}, or choose another"
        ) from None
    if changed:
        what = "images under ROOT" if "source" in changed else " and ".join(f"--{key}" for key in changed)
        raise UserError(f"{printable(out)} was begun with other {what}; delete it, or choose another --out")
    return manifest


def _foretell(out: Path, index: Index, resize: int, total: int) -> None:
    """From the headers of some images: refuse what the disk has no room for, and say when a copy will not help."""
    looked_at, larger, before, after = 0, 0, 0, 0.0
    for i in np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(int)).tolist():
        with suppress(ImageError, OSError):
            shorter = min(read_size(index.path(i)))
            looked_at, larger = looked_at + 1, larger + (shorter > resize)
            before += int(index.sizes[i])
            after += int(index.sizes[i]) * min(1.0, resize / shorter) ** 2
    if not looked_at:
        return
    needed, there = int(total * after / max(1, before)), out
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(f"the copy will take about {_mb(needed)} MB, and {printable(there)} has {_mb(free)} MB left")
    logger.info("the copy will take about %s MB, %s MB are free", _mb(needed), _mb(free))
    if larger < looked_at / 2:
        logger.warning(
            "of %d images looked at, %d have a shorter side of more than %d pixels: a copy will hardly be read faster",
            looked_at, larger, resize,
        )  # fmt: skip


def _make_folders(out: Path, splits: dict[str, Index]) -> None:
    for split, index in splits.items():
        for folder in sorted({os.path.dirname(index.relative(i)) for i in range(len(index))}):  # noqa: PTH120
            path = out / split / folder
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"can't make the folder {printable(path)}: {error.strerror}") from error
            if path.resolve() != path:
                raise UserError(f"{printable(path)} is a link that leads elsewhere; remove it")


def _shrink_all(
    splits: dict[str, Index], out: Path, manifest: Manifest, options: argparse.Namespace
) -> collections.Counter[str]:
    """Write what is not there yet. Gives how many images were resized, copied, and there before."""
    done: collections.Counter[str] = collections.Counter()
    total = sum(len(index) for index in splits.values())
    bar = Progress("prepare", total, show=True)
    tenth = 1
    try:
        for split, index in splits.items():
            dataset = ShrinkDataset(index, out / split, options.resize, options.quality)
            loader: DataLoader[list[Outcome]] = DataLoader(
                dataset,  # type: ignore[arg-type]
                batch_size=8, num_workers=options.workers, collate_fn=list, worker_init_fn=ignore_signals,
            )  # fmt: skip
            for outcomes in loader:
                for outcome in outcomes:
                    done[_settle(outcome, split, dataset, manifest).done] += 1
                bar.advance(len(outcomes))
                if done.total() * 10 >= tenth * total:
                    bar.say(f"{done.total():,} of {total:,} images")
                    tenth = done.total() * 10 // total + 1
    except KeyboardInterrupt:
        raise PreemptedError(
            f"stopped after {done.total():,} of {total:,} images; the same command goes on from there"
        ) from None
    finally:
        bar.close()
    return done


def _settle(outcome: Outcome, split: str, dataset: ShrinkDataset, manifest: Manifest) -> Outcome:
    """See to an image that is bad: noted first, then copied, so that none is ever there without a note."""
    if outcome.fault:
        name = dataset.index.relative(outcome.index)
        logger.warning("can't be used, copied as it is: %s: %s", printable(dataset.index.path(outcome.index)),
                       printable(outcome.fault))  # fmt: skip
        manifest.bad.setdefault(split, {})[name] = outcome.fault
        manifest.write()
        outcome = dataset.copy(outcome.index)
    if outcome.error:
        raise UserError(f"can't read or write {printable(outcome.error)}; the same command goes on from here")
    return outcome


def _finish(out: Path, splits: dict[str, Index], manifest: Manifest) -> dict[str, Index]:
    """Look at the copy as training will, and write that it is complete."""
    for split in splits:
        for folder, _, names in os.walk(out / split):
            for name in names:
                if re.fullmatch(TEMPORARY, name):
                    Path(folder, name).unlink(missing_ok=True)
    os.sync()
    copies = {split: scan(out / split, classes=index.classes) for split, index in splits.items()}
    for split, index in splits.items():
        if len(copies[split]) != len(index):
            raise UserError(
                f"{printable(out / split)} has {len(copies[split]):,} images, not the {len(index):,} of the original: "
                f"something else writes there; delete it and prepare it again"
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


def _is_complete(out: Path, splits: dict[str, Index]) -> bool:
    """Whether a call before has finished, and everything is as it left it."""
    try:
        found = json.loads((out / MANIFEST).read_text())
        return bool(found["complete"]) and all(
            scan(out / split, classes=index.classes).fingerprint == found["copy"][split]
            for split, index in splits.items()
        )
    except (OSError, ValueError, KeyError, UserError):
        return False


def _say_how_to_go_on(out: Path, manifest: Manifest, resize: int) -> None:
    bad = sum(map(len, manifest.bad.values()))
    if bad:
        logger.info("bad images: %d, listed in %s; data.on_bad_image says what training does about them", bad,
                    printable(manifest.path))  # fmt: skip
    light, strong = (int(resize * closest_crop(augment)) for augment in ("light", "strong"))
    logger.info("no crop is enlarged up to data.image_size=%d with data.augment=light, %d with strong", light, strong)
    logger.info("train on the copy with  data.root=%s", printable(shlex.quote(str(out))))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
