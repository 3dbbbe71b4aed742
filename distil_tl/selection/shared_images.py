"""Images that several backbones of a selection have in common: decoded and resized once, and kept in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

from torch.utils.data import Sampler

from distil_tl.data.augmentation import Augment
from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.loader import Batch, ImageDataset
from distil_tl.data.sampler import SampleKey
from distil_tl.data.source import ImageSource
from distil_tl.data.splits import Splits
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.preprocess import Preprocess
from distil_tl.utils.memory import available_memory

MEMORY_SHARE = 0.25  # of free memory, for the images of all ranks of a node


class ImageMemory:
    """Batches of images without augmentation, as long as all images of a split fit.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._fitting = set[tuple[Any, ...]]()
        self.batches: dict[tuple[Any, ...], Batch] = {}

    def fits(self, kind: tuple[Any, ...], size: int) -> bool:
        """Whether there is room for all images of a kind, which is then kept free."""
        if kind not in self._fitting and size <= self._left:
            self._left -= size
            self._fitting.add(kind)
        return kind in self._fitting


def image_memory(info: DistInfo) -> ImageMemory:
    """A memory for a part of what this rank may use."""
    return ImageMemory(int(MEMORY_SHARE * available_memory() / info.launch.local_world_size))


class SharedImages(ImageSource):
    """A source whose images without augmentation are those of `memory`, if it has them, or else are put there."""

    # Seven with `self`: one more than the source.
    def __init__(
        self,
        info: DistInfo,
        config: DataConfig,
        splits: Splits,
        preprocess: Preprocess,
        bad_images: BadImages,
        memory: ImageMemory,
    ) -> None:
        super().__init__(info, config, splits.as_dict(), preprocess, bad_images)
        self._memory = memory
        self._plain = WeakSet[ImageDataset]()  # datasets without augmentation

    def train_dataset(self, split: str, image_size: int, augment: Augment, **more: Any) -> ImageDataset:
        dataset = super().train_dataset(split, image_size, augment, **more)
        if augment == "none":
            self._plain.add(dataset)
        return dataset

    def loader(  # type: ignore[override]  # batches that are kept need no loader
        self, dataset: ImageDataset, batches: Sampler[list[SampleKey]], batch_size: int
    ) -> Iterable[Batch]:
        kind, memory = self._kind(dataset), self._memory
        if dataset not in self._plain or not memory.fits(kind, len(dataset) * dataset.bytes_per_image):
            return super().loader(dataset, batches, batch_size)
        keys = [(*kind, *(key.image for key in batch)) for batch in batches]
        if all(key in memory.batches for key in keys):
            return [memory.batches[key] for key in keys]
        return self._kept(super().loader(dataset, batches, batch_size), keys)

    def _kept(self, loader: Iterable[Batch], keys: list[tuple[Any, ...]]) -> Iterator[Batch]:
        """The same batches, kept as they pass; those with bad images are read again."""
        for key, batch in zip(keys, loader, strict=True):
            if not batch.faults:
                self._memory.batches[key] = batch.moved(lambda part: part.clone())  # not of a loader process
            yield batch

    def _kind(self, dataset: ImageDataset) -> tuple[Any, ...]:
        """What pixels depend on, other than the images; the mean and deviation of the weights come later."""
        how, size = self.preprocess, dataset.image_size
        fill = how.fill if how.crop_mode == "border" else None
        images = dataset.index.fingerprint, dataset.index.times
        return *images, size, how.crop_mode, how.resize_for(size), how.interpolation, fill
