"""The data of a run: one scan on rank 0, the same index everywhere, and loaders over it."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distil_tl.data.config import SPLITS, DataConfig
from distil_tl.data.digits import digits_folder
from distil_tl.data.index import Index, differences, scan
from distil_tl.data.loader import (
    ImageDataset,
    Loader,
    choose_workers,
    make_loader,
    plan_batches,
    warn_of_few_cpus,
)
from distil_tl.data.local_copy import stage_archive, stage_folder
from distil_tl.data.sampler import EvalSampler, TrainSampler
from distil_tl.data.transforms import eval_transform, train_transform
from distil_tl.distributed.collectives import share_arrays
from distil_tl.distributed.process_group import DistInfo, on_rank_zero
from distil_tl.models.preprocess import Preprocess
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic
from distil_tl.utils.log import logger, printable


@dataclass(frozen=True)
class Splits:
    train: Index
    val: Index
    test: Index | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    def __getitem__(self, split: str) -> Index | None:
        index: Index | None = getattr(self, split)
        return index

    def remember(self, run_dir: Path) -> None:
        """Write down which images there are, for `refuse_drift` to compare with."""
        (run_dir / "index").mkdir(exist_ok=True)
        for split in SPLITS:
            index, path = self[split], run_dir / "index" / f"{split}.npz"
            before = _remembered(path)
            if index is not None and (before is None or before.fingerprint != index.fingerprint):
                packed = io.BytesIO()
                np.savez(packed, **index.to_arrays())  # type: ignore[arg-type]
                write_atomic(path, packed.getvalue())

    def refuse_drift(self, fingerprints: dict[str, str], run_dir: Path) -> None:
        """Raises UserError, with the differences, when the images are not those that a checkpoint was made with."""
        for split, fingerprint in fingerprints.items():
            index, path = self[split], run_dir / "index" / f"{split}.npz"
            if index is not None and index.fingerprint == fingerprint:
                continue
            where, what = split, "files were added, removed or changed"
            if index is not None:
                where = str(index.root)
                before = _remembered(path)
                if before is not None:
                    what = str(differences(before, index))
            raise UserError(
                f"the images under {where} are not those that this run began with ({what}), so going on would not be "
                f"the same training; put them back, or choose another run_dir"
            )


def _remembered(path: Path) -> Index | None:
    """The images written down at `path`; None if there is no such file, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Index.from_arrays(dict(arrays))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def open_splits(info: DistInfo, config: DataConfig) -> Splits:
    """Scan train/, val/ and test/ (if there) on rank 0 and give every rank the result; a tar file is unpacked first.

    Raises:
        UserError: on all ranks: empty classes, classes that train lacks, fewer images than one global batch, a tar
            file that a node can't unpack.
    """
    archive = Path(config.root) if config.root is not None and Path(config.root).is_file() else None
    unpacked = stage_archive(info, config.stage_to, archive) if archive and config.stage_to else None

    def work() -> dict[str, Index]:
        root = unpacked or data_root(config)
        scanned = {"train": scan(root / "train")}
        for split in SPLITS[1:]:
            if split == "val" or (root / split).is_dir():
                scanned[split] = scan(root / split, classes=scanned["train"].classes)
        if len(scanned["train"]) < config.global_batch_size:
            raise UserError(
                f"{root / 'train'} has {len(scanned['train'])} images, fewer than one global batch; set "
                f"data.global_batch_size to at most that"
            )
        if archive:  # its files were written just now, and on each node at another time
            changed = archive.stat()
            digest = hashlib.sha256(f"{archive.name} {changed.st_size} {changed.st_mtime_ns}".encode()).hexdigest()
            scanned = {split: replace(index, times=digest) for split, index in scanned.items()}
        return scanned

    try:
        indexes = share_indexes(info, work)
    except UserError as error:
        raise UserError(f"{error} (unpacked from {archive})" if unpacked else str(error)) from error
    warn_of_few_cpus(info.launch, config.workers)
    for name, index in indexes.items():
        notes = f", {index.ignored} other files ignored" if index.ignored else ""
        notes += f", none of: {', '.join(map(printable, index.missing))}" if index.missing else ""
        logger.info("%s: %s images of %d classes%s", name, f"{len(index):,}", len(index.classes), notes)
    if archive and unpacked:  # by the name of the file, which is the same on all nodes, and outlives their disks
        indexes = {name: replace(index, root=archive / name, copy=unpacked / name) for name, index in indexes.items()}
    return Splits(indexes["train"], indexes["val"], indexes.get("test"))


def bring_near(info: DistInfo, config: DataConfig, splits: Splits) -> Splits:
    """The same splits, read from a copy on each node's own disk where `data.stage_to` names one and they fit."""
    if config.stage_to is None or splits.train.copy is not None:
        return splits
    indexes = {name: index for name in SPLITS if (index := splits[name]) is not None}
    copy = stage_folder(info, config.stage_to, indexes)
    if copy is None:
        return splits
    indexes = {name: replace(index, copy=copy / name) for name, index in indexes.items()}
    return Splits(indexes["train"], indexes["val"], indexes.get("test"))


def data_root(config: DataConfig) -> Path:
    """The folder of the splits; the embedded digits, written when they are not there, if none is configured."""
    return Path(config.root) if config.root is not None else digits_folder()


def share_indexes(info: DistInfo, work: Callable[[], dict[str, Index]]) -> dict[str, Index]:
    """What `work`, run on rank 0 alone, scanned: on every rank."""
    scanned: dict[str, Index] = {}
    names = on_rank_zero(info, "scanning the data", lambda: scanned.update(work()) or list(scanned))
    # Each split goes as it is shared, so that rank 0 does not hold all of them twice.
    arrays = ((name, scanned.pop(name).to_arrays() if info.is_main else None) for name in names)
    return {name: Index.from_arrays(share_arrays(info, packed)) for name, packed in arrays}


def train_batches(
    info: DistInfo,
    config: DataConfig,
    index: Index,
    preprocess: Preprocess,
    *,
    image_size: int,
    augment: str,
    seed: int,
    stage: str,
) -> tuple[TrainSampler, Loader]:
    """The sampler and loader of a stage; set the sampler's position before each epoch."""
    sampler = TrainSampler(
        len(index),
        global_batch_size=config.global_batch_size,
        world_size=info.world_size,
        rank=info.rank,
        seed=seed,
        stage=stage,
    )
    transform = train_transform(preprocess, image_size, augment, config.hflip)
    dataset = ImageDataset(index, transform, image_size, seed=seed, stage=stage)
    plan = plan_batches(config.global_batch_size, info.world_size, config.max_local_batch_size)
    return sampler, _loader(info, config, dataset, sampler, plan.micro)


def eval_batches(
    info: DistInfo, config: DataConfig, index: Index, preprocess: Preprocess, *, image_size: int
) -> Loader:
    """Every image of `index` once over all ranks."""
    dataset = ImageDataset(index, eval_transform(preprocess, image_size), image_size)
    sampler = EvalSampler(len(index), world_size=info.world_size, rank=info.rank)
    share = max(1, config.global_batch_size // info.world_size)
    return _loader(info, config, dataset, sampler, min(share, config.max_local_batch_size or share))


def _loader(
    info: DistInfo,
    config: DataConfig,
    dataset: ImageDataset,
    sampler: TrainSampler | EvalSampler,
    batch_size: int,
) -> Loader:
    workers = choose_workers(info.launch, config.workers)
    return make_loader(dataset, sampler, batch_size=batch_size, workers=workers, pin_memory=info.device.type == "cuda")
