"""The images of all splits: those of the folders train, val and test, or of a split that is made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distil_tl.data.config import SPLITS, DataConfig, has_splits
from distil_tl.data.index import Array, Index, quoted
from distil_tl.data.scan import scan
from distil_tl.data.split import MOST_READ, assign_splits
from distil_tl.data.split_file import NAME, read_split_file
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger, printable


def find_splits(config: DataConfig, root: Path, run_dir: Path | None = None) -> tuple[dict[str, Index], str]:
    """The indexes of train, val and, if there is one, test, in the folder `root`; and how they were made, in words.

    Args:
        run_dir: of the run to resume, whose split.csv decides where the split was made here.

    Raises:
        UserError: a class without images, a class that train does not have, or images that can't be divided.
    """
    if has_splits(root):
        train = scan(root / "train", extensions=config.image_extensions)
        indexes = {"train": train}
        for split in SPLITS[1:]:
            if split == "val" or (root / split).is_dir():
                indexes[split] = scan(root / split, classes=train.classes, extensions=config.image_extensions)
        return indexes, ""
    whole = scan(root, extensions=config.image_extensions)
    if run_dir is not None and (run_dir / NAME).is_file():
        return divided(whole, read_split_file(run_dir / NAME, whole).codes), f"that of {printable(run_dir / NAME)}"
    assigned = assign_splits(whole, config.split, None, compare_contents=len(whole) <= MOST_READ)
    note = printable(f"{root} has no split, so one is made: {'; '.join(assigned.notes)}")
    return divided(whole, assigned.codes), note


def find_split(config: DataConfig, root: Path, split: str, classes: Sequence[str], run_dir: Path) -> Index:
    """The index of one split of `root` for the evaluation of a run with these classes.

    The split of the run decides, if one was made for it and `root` has its images. A folder of other images, which
    has no splits, counts as a whole.

    Raises:
        UserError: there is no such split, some images are of the run and some not, or an error of `scan`.
    """
    if has_splits(root) or (root / split).is_dir() or not (run_dir / NAME).is_file():
        return scan(root / split, classes=classes, extensions=config.image_extensions)
    whole = scan(root, classes=classes, extensions=config.image_extensions)
    held = read_split_file(run_dir / NAME, whole)
    if not held.same.any():
        logger.info("%s has no image of %s and no splits: all its images are evaluated", printable(root),
                    printable(run_dir / NAME))  # fmt: skip
        return whole
    if not held.same.all():
        unknown = np.flatnonzero(~held.same)[:3].tolist()
        raise UserError(
            f"{int((~held.same).sum())} of the {len(whole)} images in {root} are not those of {run_dir / NAME}, which "
            f"says what is in {split} ({', '.join(quoted(whole.relative_path(i)) for i in unknown)}): restore the "
            f"images, or put others into a folder of their own, as in data.root=OTHER"
        )
    chosen = held.codes == SPLITS.index(split)
    if not chosen.any():
        raise UserError(f"{run_dir / NAME} has no images in {split}; it was made without, as data.split.{split} was 0")
    return whole.selected(chosen)


def divided(whole: Index, codes: Array) -> dict[str, Index]:
    """The indexes of the splits. `codes`: uint8 [N], positions in SPLITS; test may have no image."""
    indexes = {}
    for code, split in enumerate(SPLITS):
        chosen = codes == code
        if split != "test" or chosen.any():
            index = whole.selected(chosen)
            indexes[split] = index if split == "train" else replace(index, ignored=0, ignored_note="")
    return indexes
