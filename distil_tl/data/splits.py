"""The splits of a run: scanned once on rank 0, the same index on all ranks, and loaders for it."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distil_tl.data.config import SPLIT_FILE, SPLITS, DataConfig
from distil_tl.data.digits import digits_folder
from distil_tl.data.find_splits import balance_hint, find_split, find_splits
from distil_tl.data.index import Index, differences
from distil_tl.data.intensity import intensity_warning
from distil_tl.data.loader import warn_of_few_cpus
from distil_tl.data.local_copy import stage_folder
from distil_tl.data.pixels import agree_on_pixels
from distil_tl.data.split_file import write_split_file
from distil_tl.data.tar_archive import stage_archive
from distil_tl.distributed.collectives import share_arrays
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.utils.args import read_yaml
from distil_tl.utils.auto import AUTO
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import open_regular, write_atomic
from distil_tl.utils.log import logger, printable


@dataclass(frozen=True)
class Splits:
    """The index of each split; `splits["train"]` is `splits.train`."""

    train: Index
    val: Index
    test: Index | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def made_here(self) -> bool:
        """Whether the splits are parts of one folder or table, not folders of their own."""
        return self.train.root == self.val.root

    def as_dict(self) -> dict[str, Index]:
        """The splits that exist, by name."""
        return {name: index for name in SPLITS if (index := self[name]) is not None}

    def __getitem__(self, split: str) -> Index | None:
        index: Index | None = getattr(self, split)
        return index

    def save(self, run_dir: Path) -> None:
        """Save the indexes in the run directory, for `refuse_changed_images` to compare with, and a split made here."""
        (run_dir / "index").mkdir(exist_ok=True)
        changed = {}
        for split, index in self.as_dict().items():
            path = run_dir / "index" / f"{split}.npz"
            saved = _load_index(path)
            if saved is None or saved.fingerprint != index.fingerprint:
                changed[path] = index
        # Before the indexes, which tell whether it is up to date: the process may be killed in between.
        if self.made_here and (changed or not (run_dir / SPLIT_FILE).is_file()):
            write_split_file(run_dir / SPLIT_FILE, self.as_dict())
        for path, index in changed.items():
            packed = io.BytesIO()
            np.savez(packed, **index.to_arrays())  # type: ignore[arg-type]
            write_atomic(path, packed.getvalue())

    def refuse_changed_images(self, fingerprints: dict[str, str], run_dir: Path) -> None:
        """Raises UserError, with the differences, if the images differ from those of a checkpoint."""
        for split, fingerprint in fingerprints.items():
            index, path = self[split], run_dir / "index" / f"{split}.npz"
            if index is not None and index.fingerprint == fingerprint:
                continue
            root, changes = split, "files were added, removed or changed"
            if index is not None:
                root = str(index.root)
                saved = _load_index(path)
                if saved is not None:
                    changes = str(differences(saved, index))
                    changes += _other_root(run_dir, index.root)
            raise UserError(
                f"the images in {root} differ from those that this run was started with ({changes}); restore them, or "
                f"choose another run_dir"
            )


def _other_root(run_dir: Path, now: Path) -> str:
    """What is said of a run that began with another data.root than one of a split in `now`; else empty."""
    with suppress(UserError):
        saved = (read_yaml(run_dir / "config.yaml").get("data") or {}).get("root")
        if saved and "${" not in saved and Path(saved).resolve() not in (now.resolve(), now.resolve().parent):
            return f"; data.root was {saved}"
    return ""


def _load_index(path: Path) -> Index | None:
    """The index saved at `path`; None if the file is missing or damaged."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            return Index.from_arrays(dict(arrays))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def open_splits(info: DistInfo, config: DataConfig, run_dir: Path | None = None) -> Splits:
    """The splits train, val and, if it exists, test, scanned on rank 0. A tar file is unpacked on every node first.

    Args:
        run_dir: of the run to resume, if there is one.

    Raises:
        UserError: on all ranks: they decode images differently, a class without images, a class that train does not
            have, fewer images than one global batch, a tar file that a node cannot unpack.
    """
    agree_on_pixels(info, config)
    if config.root is None:
        logger.info("no data.root is given: this is the demo, on the embedded digits")
    archive = Path(config.root) if config.root is not None and Path(config.root).is_file() else None
    unpacked = stage_archive(info, config.stage_to, archive) if archive and config.stage_to else None

    try:
        indexes = share_indexes(info, lambda: _scan_splits(config, unpacked or data_root(config), archive, run_dir))
    except UserError as error:
        raise UserError(f"{error} (unpacked from {archive})" if unpacked else str(error)) from error
    warn_of_few_cpus(info.launch, config.workers)
    for name, index in indexes.items():
        notes = f", {printable(index.ignored_note)}" if index.ignored_note else ""
        notes += f", no images of: {', '.join(map(printable, index.missing))}" if index.missing else ""
        logger.info("%s: %s images of %d classes%s", name, f"{len(index):,}", len(index.classes), notes)
    if hint := balance_hint(indexes["train"], config.balance):
        logger.info("train: %s", hint)
    if archive and unpacked:  # records name the tar file, which is the same on all nodes and is not deleted
        indexes = {name: replace(index, root=archive / name, copy=unpacked / name) for name, index in indexes.items()}
    return Splits(indexes["train"], indexes["val"], indexes.get("test"))


def open_split(info: DistInfo, config: DataConfig, split: str, classes: Sequence[str], run_dir: Path) -> Index:
    """One split for the trained model of a run, scanned on rank 0; a target is a position in `classes`.

    Raises:
        UserError: on all ranks: they decode images differently, there is no such split, a class is not in `classes`.
    """
    agree_on_pixels(info, config)

    def scanned() -> dict[str, Index]:
        found = find_split(config, data_root(config), split, classes, run_dir)
        if warning := intensity_warning(len(found), found.path, config.intensity):
            logger.warning("%s: %s", split, warning)
        return {split: found}

    index = share_indexes(info, scanned)[split]
    if index.ignored_note:
        logger.info("%s: %s", split, printable(index.ignored_note))
    return index


def _scan_splits(config: DataConfig, root: Path, archive: Path | None, run_dir: Path | None) -> dict[str, Index]:
    """The indexes of the splits in `root`, to which `archive` was unpacked if it is given."""
    indexes, note = find_splits(config, root, run_dir)
    if note:
        logger.info("split: %s", printable(note))
    train = indexes["train"]
    if train.weights is not None and not train.weights.any():
        raise UserError(f"data.labels={config.labels}: the weights of all training images are 0; correct them")
    if len(train.classes) == 1:
        logger.warning("%s: one class only: a classifier of one class learns nothing", printable(train.root))
    if config.global_batch_size != AUTO and len(train) < config.global_batch_size:
        raise UserError(
            f"{train.root} has {len(train)} images{' in train' if train.root == root else ''}, fewer than one global "
            f"batch; set data.global_batch_size to at most {len(train)}, or to auto"
        )
    if warning := intensity_warning(len(train), train.path, config.intensity):
        logger.warning("train: %s", warning)
    if archive:  # the times of the unpacked files are new, and differ between nodes
        status = archive.stat()
        digest = hashlib.sha256(f"{archive.name} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
        indexes = {split: replace(index, times=digest) for split, index in indexes.items()}
    return indexes


def copy_to_local_disk(info: DistInfo, config: DataConfig, splits: Splits) -> Splits:
    """The same splits, read from a copy on each node's own disk if `data.stage_to` is set and they fit."""
    if config.stage_to is None or splits.train.copy is not None:
        return splits
    indexes = splits.as_dict()
    copy = stage_folder(info, config.stage_to, indexes)
    if copy is None:
        return splits
    indexes = {name: replace(index, copy=copy / name) for name, index in indexes.items()}
    return Splits(indexes["train"], indexes["val"], indexes.get("test"))


def data_root(config: DataConfig) -> Path:
    """The folder of the splits; if none is configured, that of the embedded digits, created if necessary."""
    return Path(config.root) if config.root is not None else digits_folder()


def share_indexes(info: DistInfo, scan_splits: Callable[[], dict[str, Index]]) -> dict[str, Index]:
    """The indexes that `scan_splits` returns on rank 0, on all ranks. The other ranks do not call it."""
    scanned: dict[str, Index] = {}  # empty on the other ranks

    def scan_and_name() -> list[str]:
        scanned.update(scan_splits())
        return list(scanned)

    indexes = {}
    for name in on_rank_zero(info, "scanning the data", scan_and_name):
        # Taken out of `scanned` one by one, so that rank 0 does not hold two copies of all splits at once.
        arrays = scanned.pop(name).to_arrays() if info.is_main else None
        indexes[name] = Index.from_arrays(share_arrays(info, arrays))
    return indexes
