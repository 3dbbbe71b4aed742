"""The images of all splits: those of the folders train, val and test, or of a split that is made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distil_tl.data.config import SPLIT_FILE, SPLITS, DataConfig, SplitConfig, has_splits, is_divided
from distil_tl.data.index import Array, Index, quoted, relabelled, relabelled_note
from distil_tl.data.scan import scan
from distil_tl.data.split import MOST_READ, TEST, TRAIN, VAL, assign_splits
from distil_tl.data.split_file import read_split_file
from distil_tl.data.table import Table, read_table
from distil_tl.data.walk import images_beside
from distil_tl.utils.errors import UserError, listed
from distil_tl.utils.log import logger, printable

UNEQUAL = 10  # times as many images in the largest class as in the smallest, from which on it is said


def find_splits(
    config: DataConfig, root: Path, run_dir: Path | None = None, *, most_read: int = MOST_READ
) -> tuple[dict[str, Index], str]:
    """The indexes of train, val and, if there is one, test; and how they were made, in words.

    Args:
        root: the folder of the images.
        run_dir: of the run to resume, whose split.csv decides where the split was made here.
        most_read: number of images up to which contents are compared.

    Raises:
        UserError: a class without images, a class that train does not have, a table that can't be used, or images
            that can't be divided.
    """
    if not is_divided(config, root):
        train = scan(root / "train", extensions=config.image_extensions)
        indexes = {"train": train}
        for split in SPLITS[1:]:
            if split == "val" or (root / split).is_dir():
                indexes[split] = scan(root / split, classes=train.classes, extensions=config.image_extensions)
        return indexes, ""
    if config.labels is None:
        table = Table(scan(root, extensions=config.image_extensions), None, None, "")
    else:
        table = read_table(config, root)
        if beside := images_beside(table.index, config.image_extensions):
            images = "1 image is" if beside == 1 else f"{beside:,} images are"
            logger.info("%s below %s, but not in data.labels=%s", images, printable(root), printable(config.labels))
    whole, said = table.index, f"{table.note}; " if table.note else ""
    if table.splits is not None:
        _refuse_untrained_classes(config, whole, table.splits == TRAIN)
    if table.splits is not None and VAL in table.splits:
        _refuse_useless_split(config)
        return divided(whole, table.splits), table.note
    if run_dir is not None and (run_dir / SPLIT_FILE).is_file():
        return divided(whole, read_split_file(run_dir / SPLIT_FILE, whole).codes), f"{said}as in {run_dir / SPLIT_FILE}"
    codes, notes = _assigned(config, table, most_read)
    lacking = "val" if table.splits is not None else "split"
    return divided(whole, codes), f"{said}{'it' if said else root} has no {lacking}, so one is made: {notes}"


def _assigned(config: DataConfig, table: Table, most_read: int) -> tuple[Array, str]:
    """The split that is made for the images, or for those of train where a table has no val."""
    whole, groups = table.index, table.groups
    if table.splits is None:
        assigned = assign_splits(whole, config.split, groups, compare_contents=len(whole) <= most_read)
        return assigned.codes, "; ".join(assigned.notes)
    if config.split.test and TEST in table.splits:
        raise UserError("data.split.test has no effect, as the table has test in a column; remove it")
    chosen = table.splits == TRAIN
    part, codes = whole.selected(chosen), table.splits.copy()
    groups = None if groups is None else groups[chosen]
    assigned = assign_splits(part, config.split, groups, compare_contents=len(part) <= most_read)
    codes[chosen] = assigned.codes
    return codes, "; ".join(assigned.notes)


def _refuse_untrained_classes(config: DataConfig, whole: Index, trained: Array) -> None:
    """Raise UserError for classes of which a table has no image in train, as `scan` does for folders of val."""
    if untrained := [quoted(name) for name in whole.selected(trained).missing]:
        raise UserError(
            f"data.labels={config.labels} has no image in train of the classes {listed(untrained, 8)}; correct its "
            f"column with the split, or remove their rows"
        )


def _refuse_useless_split(config: DataConfig) -> None:
    if config.split != SplitConfig():
        raise UserError(
            f"data.split has no effect, as data.labels={config.labels} has a column with the split; remove data.split, "
            f"or set data.columns.split=none to make another one"
        )


def find_split(config: DataConfig, root: Path, split: str, classes: Sequence[str], run_dir: Path) -> Index:
    """The index of one split for the evaluation of a run with these classes.

    The split of the run decides, if one was made for it and these are its images. Other images, which have no splits,
    count as a whole.

    Raises:
        UserError: there is no such split, some images are of the run and some not, or an error of `find_splits`.
    """
    kept = run_dir / SPLIT_FILE
    if config.labels is not None:
        table = read_table(config, root, classes)
    elif has_splits(root) or (root / split).is_dir() or not kept.is_file():
        return scan(root / split, classes=classes, extensions=config.image_extensions)
    else:
        table = Table(scan(root, classes=classes, extensions=config.image_extensions), None, None, "")
    whole = table.index
    held = read_split_file(kept, whole) if kept.is_file() else None
    if held is None or not held.same.any():
        if table.splits is None:
            name = printable(config.labels or root)
            logger.info("%s has no splits, and no image of the run: all are evaluated", name)
            return whole
        return _of_split(whole, table.splits, split, f"data.labels={config.labels} has no image in {split}")
    if not held.same.all():
        unknown = np.flatnonzero(~held.same)[:3].tolist()
        raise UserError(
            f"{int((~held.same).sum())} of the {len(whole)} images in {config.labels or root} are not those of {kept}, "
            f"which says what is in {split} ({', '.join(quoted(whole.relative_path(i)) for i in unknown)}): restore "
            f"the images, or put others into a folder of their own, as in data.root=OTHER"
        )
    code = SPLITS.index(split)
    edited = [relabelled(whole, i, old) for i, old in held.relabelled.items() if held.codes[i] == code]
    if edited:
        logger.warning("%s: since the run was made, %s; the labels of now are used", split, relabelled_note(edited))
    return _of_split(whole, held.codes, split, f"{kept} has no images in {split}")


def _of_split(whole: Index, codes: Array, split: str, problem: str) -> Index:
    chosen = codes == SPLITS.index(split)
    if not chosen.any():
        raise UserError(problem)
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


def balance_hint(index: Index, balance: str) -> str | None:
    """A sentence if the classes have very different sizes, and nothing is done about it."""
    counts = index.class_counts
    if balance != "none" or counts.min() * UNEQUAL > counts.max():
        return None
    largest, smallest = (printable(index.classes[i]) for i in (counts.argmax(), counts.argmin()))
    return (
        f"class {largest} has {counts.max() // max(1, counts.min())} times as many images as {smallest} "
        f"({counts.max():,} and {counts.min():,}): try data.balance=logit_adjust, and metric=balanced_accuracy"
    )
