"""The work of `distil-tl prepare`: find the images and their split, copy them, look for duplicates."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from distil_tl.data.config import SPLITS, DataConfig, is_divided
from distil_tl.data.duplicates import report_duplicates
from distil_tl.data.find_splits import find_splits
from distil_tl.data.index import Index
from distil_tl.data.pixels import refuse_missing_decoders
from distil_tl.data.resized_copy import copy_resized
from distil_tl.data.scan import scan
from distil_tl.data.split_file import write_split_file
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger, printable
from distil_tl.utils.threads import available_cpus


# Eight parameters: the options of the command.
def prepare(
    config: DataConfig,
    root: Path,
    out: Path,
    *,
    only_table: bool,
    resize: int | None,
    quality: int,
    workers: int | None,
    duplicates: Path | None,
) -> None:
    """Write the images of `root` with their split to `out`.

    Args:
        root, out: resolved paths.
        only_table: `out` is a new table, and no image is copied.
        resize: maximum shorter side in pixels; None: no change.
        quality: of JPEGs.
        workers: processes; None: as many as there are CPUs.
        duplicates: a file for the images that are in two splits; None: they are not looked for.

    Raises:
        UserError: there are no images, a format has no decoder, they can't be divided, or an error of `copy_resized`.
        PreemptedError: Ctrl-C; what is written stays.
    """
    refuse_missing_decoders(config)
    workers = available_cpus() if workers is None else workers
    splits = prepared_splits(config, root)
    if only_table:
        try:
            write_split_file(out, splits)
        except OSError as error:
            raise UserError(f"can't write {printable(out)}: {error.strerror or error}") from error
        names = (printable(shlex.quote(str(path))) for path in (root, out))
        logger.info("train on this split with  data.root=%s data.labels=%s", *names)
    else:
        copy_resized(config, splits, out, resize=resize, quality=quality, workers=workers)
    if duplicates is not None:
        report_duplicates(splits, duplicates, workers)


def prepared_splits(config: DataConfig, root: Path) -> dict[str, Index]:
    """The images of each split. Contents are compared for any number of images. Raises UserError."""
    if is_divided(config, root):
        splits, note = find_splits(config, root, most_read=sys.maxsize)
        logger.info("split: %s", printable(note))
        for split, index in splits.items():
            logger.info("%s: %s images of %d classes", split, f"{len(index):,}", len(index.classes))
        return splits
    splits = {"train": scan(root / "train", extensions=config.image_extensions)}
    for split in SPLITS[1:]:
        if (root / split).is_dir():
            splits[split] = scan(root / split, classes=splits["train"].classes, extensions=config.image_extensions)
    return splits
