"""The images of a run as batches: loaders, the transfer to the device, and the policy for bad images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.device import to_device
from distil_tl.data.index import Index
from distil_tl.data.loader import Batch, ImageDataset, Loader, choose_workers, make_loader
from distil_tl.data.sampler import EvalSampler, TrainSampler
from distil_tl.data.transforms import eval_transform, train_transform
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.preprocess import Preprocess


class ImageSource:
    """Loads the images of some splits for this rank.

    Args:
        splits: indexes by name of the split.
        preprocess: what the model's weights expect.
        bad_images: the policy for images that can't be decoded, and those found so far.
    """

    def __init__(
        self,
        info: DistInfo,
        config: DataConfig,
        splits: Mapping[str, Index],
        preprocess: Preprocess,
        bad_images: BadImages,
    ) -> None:
        self.info = info
        self.config = config
        self.splits = splits
        self.preprocess = preprocess
        self.bad_images = bad_images

    def index(self, split: str) -> Index:
        return self.splits[split]

    def train_dataset(self, split: str, image_size: int, augment: str, *, seed: int, stage: str) -> ImageDataset:
        """The images of a split as training sees them; `seed` and `stage` key the random numbers of augmentation."""
        transform = train_transform(self.preprocess, image_size, augment, self.config.hflip)
        return ImageDataset(self.index(split), transform, image_size, seed=seed, stage=stage)

    def sampler(self, *, seed: int, stage: str) -> TrainSampler:
        """The training order of a stage, for this rank."""
        return TrainSampler(
            len(self.index("train")),
            global_batch_size=self.config.global_batch_size,
            world_size=self.info.world_size,
            rank=self.info.rank,
            seed=seed,
            stage=stage,
        )

    def train_loader(self, dataset: ImageDataset, sampler: TrainSampler, micro_batch: int) -> Loader:
        """Batches of `micro_batch` images; set the sampler's position before each epoch."""
        return self._loader(dataset, sampler, micro_batch)

    def eval_loader(self, split: str, image_size: int) -> Loader:
        """Every image of a split once, over all ranks."""
        dataset = ImageDataset(self.index(split), eval_transform(self.preprocess, image_size), image_size)
        return self._loader(dataset, self.eval_sampler(split), self.eval_batch_size)

    def eval_sampler(self, split: str) -> EvalSampler:
        return EvalSampler(len(self.index(split)), world_size=self.info.world_size, rank=self.info.rank)

    @property
    def eval_batch_size(self) -> int:
        """Images of one forward pass of this rank in evaluation."""
        share = max(1, self.config.global_batch_size // self.info.world_size)
        return min(share, self.config.max_local_batch_size or share)

    def batches(self, loader: Loader, split: str) -> Iterator[Batch]:
        """The batches of a loader, on the device, with the policy applied to bad images.

        Raises:
            UserError: an image can't be used, and the policy is `error`.
        """
        return self.bad_images.check(to_device(loader, self.info.device), split, self.index(split))

    def _loader(self, dataset: ImageDataset, sampler: TrainSampler | EvalSampler, batch_size: int) -> Loader:
        workers = choose_workers(self.info.launch, self.config.workers)
        pin_memory = self.info.device.type == "cuda"
        return make_loader(dataset, sampler, batch_size=batch_size, workers=workers, pin_memory=pin_memory)
