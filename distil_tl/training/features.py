"""The frozen part of a network runs once: what it makes of each view of each image is kept on disk, and trained on.

Before a stage's first trained layer everything is a fixed function of the image's view, so it is read instead of
computed in each epoch. The order of the images stays what it is. The cache is a folder named by all that its numbers
depend on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch.utils.data import Sampler

from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.device import to_device
from distil_tl.data.feature_cache import Cache, FeatureDataset, available_memory, free_space
from distil_tl.data.index import Index
from distil_tl.data.loader import Batch, ImageDataset, choose_workers, make_loader
from distil_tl.data.sampler import SampleKey
from distil_tl.data.splits import Splits
from distil_tl.data.transforms import train_transform
from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.models.transfer import TransferModel
from distil_tl.rundir.checkpoint import weights_hash
from distil_tl.rundir.directory import StageRecord
from distil_tl.training.network import Prefix
from distil_tl.training.stage import StageConfig, wants_features
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import cache_dir
from distil_tl.utils.log import Progress, logger

BATCH = 32  # images that the frozen part sees at once, on a CPU
BATCH_CUDA = 256  # and there
FORMAT = 5
OF_MEMORY = 0.5  # that `auto` lets maps take of what is free: read over and over, they should stay there


def cache_key(
    model: TransferModel, prefix: Prefix, index: Index, *, image_size: int, augment: str, hflip: bool,
    seed: int, views: int,
) -> str:  # fmt: skip
    """A digest of all that features depend on: not of what is trained, nor of a seed where nothing is drawn."""
    library = sys.modules[type(model.module).__module__.partition(".")[0]]
    depends = {
        "format": FORMAT,
        "weights": weights_hash(prefix.prefix),
        "code": getattr(prefix.prefix, "code", ""),
        "layers": re.sub(r" at 0x[0-9a-f]+", "", repr(prefix.prefix)),  # with paddings, activations, epsilons
        "architecture": [type(model.module).__qualname__, getattr(library, "__version__", "")],
        "images": [index.fingerprint, index.times],  # contents are not read: a file that changed has another time
        "image_size": image_size,
        "augment": augment,
        "hflip": hflip if augment != "none" else None,
        "seed": seed if augment != "none" else None,
        "views": views,
        "preprocess": asdict(model.preprocess),
        "compute": str(prefix.compute),
        "device": next(model.module.parameters()).device.type,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


@torch.no_grad()
def compute(
    info: DistInfo,
    prefix: Prefix,
    cache: Cache,
    missing: list[tuple[int, int]],
    dataset: ImageDataset,
    *,
    split: str,
    what: str,
    bad_images: BadImages,
    batch_size: int,
    workers: int,
    agreement: Agreement,
) -> OSError | None:
    """Compute what the cache lacks, each rank some chunks; on all ranks the error that kept one from writing.

    Batches are the same whichever rank computes them, so features do not depend on how many there are.

    Raises:
        UserError: an image can't be used, and the policy does not leave it out, or its file can't be read now, which is
            not kept; or the device has no memory for a batch.
        StopAgreedError: on all ranks alike. What is computed is kept.
    """
    mine = missing[info.rank :: info.world_size]
    pinned = info.device.type == "cuda"
    parts = _Parts(cache, mine, batch_size)
    loader = make_loader(dataset, parts, batch_size=None, workers=workers if mine else 0, pin_memory=pinned)
    batches = bad_images.read(to_device(loader, info.device), split, dataset.index)
    turns = math.ceil(len(missing) / info.world_size)
    bar = Progress(f"features of {what}", turns, show=info.is_main)
    failed: OSError | None = None
    try:
        for turn in range(turns):
            agreement.check()
            if turn < len(mine) and failed is None:
                own = itertools.islice(batches, parts.per_chunk(mine[turn]))
                failed = _compute_chunk(info, prefix, cache, mine[turn], own)
            bar.advance()
    finally:
        bar.close()
    any_failed = max_over_ranks(info, float(failed is not None))
    return failed or (OSError("another rank could not write") if any_failed else None)


class _Parts(Sampler[list[SampleKey]]):
    """The batches of some chunks, made as they are asked for: keys of millions of images at once would fill memory."""

    def __init__(self, cache: Cache, chunks: list[tuple[int, int]], batch_size: int) -> None:
        self.cache = cache
        self.chunks = chunks
        self.batch_size = batch_size

    def per_chunk(self, chunk: tuple[int, int]) -> int:
        return math.ceil(len(self.cache.rows(chunk[1])) / self.batch_size)

    def __len__(self) -> int:
        return sum(map(self.per_chunk, self.chunks))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for view, first in self.chunks:
            rows = self.cache.rows(first)
            for i in range(0, len(rows), self.batch_size):
                yield [SampleKey(image, view, image) for image in rows[i : i + self.batch_size]]


def _compute_chunk(
    info: DistInfo, prefix: Prefix, cache: Cache, chunk: tuple[int, int], batches: Iterator[Batch]
) -> OSError | None:
    """Compute a chunk and write it; the error if the disk did not take it."""
    features, faults = [], dict[int, str]()
    for batch in batches:
        try:
            features.append(prefix(batch.images.to(info.device, non_blocking=True)).cpu())
        except torch.OutOfMemoryError:
            count = len(batch.images)
            raise UserError(
                f"the frozen part of the network needs more than the device's memory for {count} images; let it see "
                f"fewer at once, for example with data.max_local_batch_size={max(1, count // 4)}",
                one_rank=True,
            ) from None
        faults |= dict(batch.faults)
    try:
        cache.write(*chunk, torch.cat(features), faults)
    except OSError as error:
        return error
    return None


@dataclass(frozen=True)
class Features:
    """A stage's training and validation images, as features."""

    train: FeatureDataset
    val: FeatureDataset


def open_features(
    info: DistInfo,
    data: DataConfig,
    model: TransferModel,
    prefix: Prefix | str,
    splits: Splits,
    name: str,
    stage: StageConfig,
    record: StageRecord,
    *,
    image_size: int,
    seed: int,
    bad_images: BadImages,
    agreement: Agreement,
) -> Features | None:
    """Features for a stage, whose freezing is applied, computed as far as they are not there; None to do without.

    Args:
        prefix: or the reason why there is none.
        record: of the stage. One that began without features goes on without.

    Raises:
        UserError: the stage wants them whatever happens, and can't have them; or an image can't be used.
        StopAgreedError: on all ranks alike.
    """
    augment = stage.augment or data.augment
    if not wants_features(stage, augment) or (record.has_begun and not record.cached):
        return None
    if isinstance(prefix, str):
        _do_without(stage, name, prefix)
        return None
    if stage.views is None:
        augment = "none"

    def key_for(split: str, index: Index, augment: str, views: int) -> str:
        def named() -> str:
            return cache_key(model, prefix, index, image_size=image_size, augment=augment, hflip=data.hflip,
                             seed=seed, views=views)  # fmt: skip

        return str(on_rank_zero(info, f"naming the features of {split} for stage {name}", named))

    found = {}
    for split, views, how in (("train", stage.views or 1, augment), ("val", 1, "none")):
        index = splits[split]
        assert index is not None
        cache = Cache(cache_dir() / "features" / key_for(split, index, how, views), len(index), views)
        transform = train_transform(model.preprocess, image_size, how, data.hflip)
        dataset = ImageDataset(index, transform, image_size, seed=seed, stage="features")
        for_memory = stage.features == "auto" and not record.cached
        reason = _fill(info, data, prefix, cache, dataset, split=split, name=name, bad_images=bad_images,
                       for_memory=for_memory, agreement=agreement)  # fmt: skip
        if reason is not None:
            _do_without(stage, name, reason)
            return None
        mapped = _open(info, cache, index)
        if isinstance(mapped, str):
            _do_without(stage, name, mapped)
            return None
        bad_images.meet(mapped.bad().items(), split, index)
        found[split] = mapped
    record.cached = True
    return Features(found["train"], found["val"])


def _fill(
    info: DistInfo,
    data: DataConfig,
    prefix: Prefix,
    cache: Cache,
    dataset: ImageDataset,
    *,
    split: str,
    name: str,
    bad_images: BadImages,
    for_memory: bool,
    agreement: Agreement,
) -> str | None:
    """Make a cache complete; the reason, on all ranks alike, why it is not."""
    what = f"{split} for stage {name}"
    blank = torch.zeros(1, 3, dataset.image_size, dataset.image_size, dtype=torch.uint8, device=info.device)
    example = prefix(blank)
    size = example.numel() * example.element_size()

    def look() -> tuple[list[tuple[int, int]], str | None]:
        missing = [chunk for chunk in cache.chunks() if not cache.is_sound(*chunk)]
        to_write = size * sum(len(cache.rows(first)) for _, first in missing)
        free, memory = free_space(cache.folder), available_memory()
        if to_write > free:
            return missing, f"they take {_gb(to_write)}, and {cache.folder.parent} has {_gb(free)} free"
        total = size * cache.length * cache.views
        if for_memory and example.ndim > 2 and total > OF_MEMORY * memory:
            return missing, f"they take {_gb(total)}, too much for the {_gb(memory)} of memory that are free"
        return missing, None

    missing, reason = on_rank_zero(info, f"looking for features of {what}", look)
    if reason is not None:
        return str(reason)
    if not missing:
        logger.info("features of %s: found in %s", what, cache.folder)
    else:
        batch_size = BATCH_CUDA if info.device.type == "cuda" else BATCH
        failed = compute(
            info, prefix, cache, [(view, first) for view, first in missing], dataset, split=split, what=what,
            bad_images=bad_images,
            batch_size=min(batch_size, data.max_local_batch_size or batch_size),
            workers=choose_workers(info.launch, data.workers),
            agreement=agreement,
        )  # fmt: skip
        if failed is not None:
            return f"they can't be written to {cache.folder}: {failed.strerror or failed}"
    # Rank 0 has read what was there before, and the rest was just written: no rank has to read all of it again.
    if max_over_ranks(info, float(not all(cache.is_there(*chunk) for chunk in cache.chunks()))):
        return f"not all ranks find them in {cache.folder}; let DISTIL_TL_CACHE be on shared storage"
    return None


def _open(info: DistInfo, cache: Cache, index: Index) -> FeatureDataset | str:
    """The features; or, on all ranks alike, why a rank can't have them in its memory."""
    mapped, reason = None, ""
    try:
        mapped = cache.open(index.targets)
    except OSError as error:
        reason = f": {error.strerror or error}"
    if max_over_ranks(info, float(mapped is None)) or mapped is None:
        return f"they can't be mapped from {cache.folder} into memory{reason}"
    return mapped


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _do_without(stage: StageConfig, name: str, reason: str) -> None:
    if stage.search.wanted:
        raise UserError(f"stages.{name}.search needs features: {reason}; leave the search out")
    if stage.features == "on" or stage.views is not None:
        raise UserError(f"stages.{name}.features: {reason}; use stages.{name}.features=off and views=null")
    logger.info("stage %s: the frozen part runs in each epoch, as %s", name, reason)
