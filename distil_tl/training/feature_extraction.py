"""Feature extraction: the frozen part runs once over each view of each image, divided among the ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from distil_tl.data.augmentation import Augment
from distil_tl.data.feature_cache import FeatureCache, FeatureDataset, free_space
from distil_tl.data.index import Index
from distil_tl.data.loader import Batch, ImageDataset
from distil_tl.data.pixels import unusual_pixels
from distil_tl.data.sampler import SampleKey
from distil_tl.data.source import ImageSource
from distil_tl.distributed.collectives import gather_objects, max_over_ranks
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.rundir.state import StageRecord
from distil_tl.training.features import Features, FeaturesUnavailableError, Views, cache_key
from distil_tl.training.memory import PartSize
from distil_tl.training.network import Prefix
from distil_tl.training.stage import Stage
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import cache_dir
from distil_tl.utils.log import Progress, logger
from distil_tl.utils.memory import available_memory

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel
    from distil_tl.training.distillation import Teacher

BATCH = 32  # images in one forward pass of the frozen part, on a CPU
BATCH_CUDA = 256  # the same on a GPU
MEMORY_SHARE = 0.5  # of free memory for feature maps with features=auto, as they are read in each epoch


class FeatureExtractor:
    """Opens the features of the splits of a stage, computing what the cache does not have yet.

    Args:
        prefix: the frozen part, whose freezing is applied.
        record: of the stage.
        limit_memory: feature maps and packed features must fit in memory; pooled features may always be used.
        depends_on: what else the features depend on; a teacher's outputs are features, too.
    """

    # Ten with `self`: what a stage is set up with, kept for the methods.
    def __init__(
        self,
        info: DistInfo,
        model: TransferModel,
        prefix: Prefix | Teacher,
        source: ImageSource,
        stage: Stage,
        record: StageRecord,
        agreement: Agreement,
        *,
        limit_memory: bool,
        depends_on: dict[str, Any] | None = None,
    ) -> None:
        self.info = info
        self.model = model
        self.prefix = prefix
        self.source = source
        self.stage = stage
        self.agreement = agreement
        self.limit_memory = limit_memory
        self.depends_on = depends_on or {}
        # If an image of one rank can't be used, all ranks raise the same error at the end; else that rank does at once.
        self.fails_alike = False
        self.part_size = PartSize("features", f"the frozen part of stage {stage.name}", record.part_sizes)

    def open_all(self) -> Features:
        """The training and validation images as features. A collective.

        Raises:
            FeaturesUnavailableError: there is not enough disk space or memory for them.
            UserError: an image can't be used, or the device has too little memory.
            AllRanksStopError: on all ranks alike. Chunks that are complete are kept.
        """
        views = self.stage.config.views
        augment = "none" if views is None else self.stage.augment
        return Features(self.open("train", augment, views or 1), self.open("val", "none", 1))

    def open(self, split: str, augment: Augment, count: int) -> FeatureDataset:
        """The images of a split as features, in `count` views of each. Raises as `open_all` does."""
        index, stage = self.source.index(split), self.stage
        config = self.source.config
        pixels = unusual_pixels(config)
        views = Views(
            stage.image_size, augment, config.hflip, stage.seed, count, pixels, config.intensity, self.depends_on
        )
        key = on_rank_zero(
            self.info,
            f"naming the features of {split} for stage {stage.name}",
            lambda: cache_key(self.model, self.prefix, index, views),
        )
        cache = FeatureCache(cache_dir() / "features" / str(key), len(index), count)
        missing = self._missing_chunks(cache, split)
        if missing:
            dataset = self.source.train_dataset(split, stage.image_size, augment, seed=stage.seed, stage="features")
            self._compute(cache, missing, dataset, split)
        # Rank 0 has verified the old chunks, and the others were just written: sizes are enough here.
        if max_over_ranks(self.info, float(not all(cache.has_full_length(*chunk) for chunk in cache.chunks()))):
            raise FeaturesUnavailableError(
                f"not all ranks find them in {cache.folder}; set DISTIL_TL_CACHE to shared storage"
            )
        features = self._map(cache, index)
        self.source.bad_images.apply_policy(features.bad().items(), split, index)
        return features

    def _missing_chunks(self, cache: FeatureCache, split: str) -> list[tuple[int, int]]:
        """The chunks that are missing or damaged, after a check that there is enough disk space and memory."""
        what = f"{split} for stage {self.stage.name}"
        size = self.stage.image_size
        example = self.prefix(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.info.device))
        bytes_per_image = example.numel() * example.element_size()
        pooled = example.ndim == 2 and not (isinstance(self.prefix, Prefix) and self.prefix.packed)

        def find() -> tuple[list[tuple[int, int]], str | None]:
            missing = [chunk for chunk in cache.chunks() if not cache.is_valid(*chunk)]
            to_write = bytes_per_image * sum(len(cache.rows(first)) for _, first in missing)
            free, memory = free_space(cache.folder), available_memory()
            if to_write > free:
                return missing, f"they take {_gb(to_write)}, and {cache.folder.parent} has {_gb(free)} free"
            total = bytes_per_image * cache.length * cache.views
            if self.limit_memory and not pooled and total > MEMORY_SHARE * memory:
                return missing, f"they take {_gb(total)}, too much for {_gb(memory)} of free memory"
            return missing, None

        missing, reason = on_rank_zero(self.info, f"looking for features of {what}", find)
        if reason is not None:
            raise FeaturesUnavailableError(reason)
        if not missing:
            logger.info("features of %s: found in %s", what, cache.folder)
        return [(view, first) for view, first in missing]

    @torch.no_grad()
    def _compute(self, cache: FeatureCache, missing: list[tuple[int, int]], dataset: ImageDataset, split: str) -> None:
        """Compute chunks, each rank some of them.

        Batches are the same whichever rank computes them, so features do not depend on the number of ranks.
        """
        info, config = self.info, self.source.config
        mine = missing[info.rank :: info.world_size]
        batch_size = BATCH_CUDA if info.device.type == "cuda" else BATCH
        batch_size = min(batch_size, config.max_local_batch_size or batch_size)
        sampler = _ChunkBatches(cache, mine, batch_size)
        batches = self.source.batches(self.source.loader(dataset, sampler, batch_size), split) if mine else iter(())
        turns = math.ceil(len(missing) / info.world_size)
        failed: OSError | None = None
        refused: UserError | None = None
        with Progress(f"features of {split} for stage {self.stage.name}", len(sampler), show=info.is_main) as bar:
            for turn in range(turns):
                self.agreement.raise_if_stopping()
                if turn < len(mine) and failed is None and refused is None:
                    own = itertools.islice(batches, sampler.batches_of(mine[turn]))
                    try:
                        failed = _compute_chunk(info, self.prefix, cache, mine[turn], own, self.part_size, bar)
                    except UserError as error:
                        if not self.fails_alike:
                            raise
                        refused = error
        if self.fails_alike:
            reasons = gather_objects(info, None if refused is None else str(refused))
            if any(reasons):
                raise UserError(next(filter(None, reasons)))
        self.part_size.agree(info)
        any_failed = max_over_ranks(info, float(failed is not None))
        if any_failed:
            reason = (failed.strerror or failed) if failed else "another rank could not write"
            raise FeaturesUnavailableError(f"they can't be written to {cache.folder}: {reason}")

    def _map(self, cache: FeatureCache, index: Index) -> FeatureDataset:
        """The features, mapped into memory."""
        mapped, reason = None, ""
        try:
            mapped = cache.open(index.targets)
        except OSError as error:
            reason = f": {error.strerror or error}"
        if max_over_ranks(self.info, float(mapped is None)) or mapped is None:
            raise FeaturesUnavailableError(f"they can't be mapped from {cache.folder} into memory{reason}")
        return mapped


class _ChunkBatches(Sampler[list[SampleKey]]):
    """The batches of some chunks. Keys are made when asked for: those of millions of images would fill memory."""

    def __init__(self, cache: FeatureCache, chunks: list[tuple[int, int]], batch_size: int) -> None:
        self.cache = cache
        self.chunks = chunks
        self.batch_size = batch_size

    def batches_of(self, chunk: tuple[int, int]) -> int:
        return math.ceil(len(self.cache.rows(chunk[1])) / self.batch_size)

    def __len__(self) -> int:
        return sum(map(self.batches_of, self.chunks))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for view, first in self.chunks:
            rows = self.cache.rows(first)
            for i in range(0, len(rows), self.batch_size):
                yield [SampleKey(image, view, image) for image in rows[i : i + self.batch_size]]


def _compute_chunk(
    info: DistInfo,
    prefix: Prefix | Teacher,
    cache: FeatureCache,
    chunk: tuple[int, int],
    batches: Iterator[Batch],
    part_size: PartSize,
    bar: Progress,
) -> OSError | None:
    """Compute a chunk and write it. Returns the error if it can't be written."""
    features, faults = [], dict[int, str]()
    for batch in batches:
        features.append(part_size.apply(prefix, batch.images.to(info.device, non_blocking=True)).cpu())
        faults |= dict(batch.faults)
        bar.advance()
    try:
        cache.write(*chunk, torch.cat(features), faults)
    except OSError as error:
        return error
    return None


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
