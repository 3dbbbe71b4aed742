"""The images of a run as batches: loaders, the transfer to the device, and the policy for bad images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch.utils.data import Sampler

from distil_tl.data.augmentation import Augment
from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.device import to_device
from distil_tl.data.feature_cache import FeatureDataset, feature_loader
from distil_tl.data.index import Index
from distil_tl.data.loader import Batch, ImageDataset, Loader, choose_workers, make_loader
from distil_tl.data.mixed_batches import MixedBatches, MixedDataset
from distil_tl.data.mixing import Mixing
from distil_tl.data.prefetch import plan_prefetch
from distil_tl.data.sampler import EvalBatches, EvalSampler, SampleKey, TrainSampler, in_batches
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

    # Seven with `self`: all that an image in training depends on.
    def train_dataset(
        self, split: str, image_size: int, augment: Augment, *, seed: int, stage: str, mixing: Mixing | None = None
    ) -> ImageDataset:
        """The images of a split as training sees them; `seed` and `stage` key the random numbers of augmentation."""
        transform = train_transform(self.preprocess, image_size, augment, self.config.hflip)
        kind = ImageDataset if mixing is None else MixedDataset
        dataset = kind(
            self.index(split), transform, image_size, seed=seed, stage=stage, intensity=self.config.intensity
        )
        if isinstance(dataset, MixedDataset):
            assert mixing is not None
            dataset.mixing = mixing
        return dataset

    def sampler(self, *, seed: int, stage: str, epochs: int, whole: bool = False) -> TrainSampler:
        """The training order of a stage, for this rank; or if `whole`, of all ranks together."""
        index = self.index("train")
        return TrainSampler(
            len(index),
            global_batch_size=self.config.global_batch_size,
            world_size=1 if whole else self.info.world_size,
            rank=0 if whole else self.info.rank,
            seed=seed,
            stage=stage,
            epochs=epochs,
            targets=index.targets if self.config.balance == "sampler" else None,
        )

    def train_loader(self, dataset: ImageDataset, sampler: TrainSampler, micro_batch: int) -> Loader:
        """Batches of `micro_batch` images; set the position of the sampler before iterating."""
        if isinstance(dataset, MixedDataset):
            batches = MixedBatches(sampler, micro_batch, dataset.mixing)
            return self.loader(dataset, batches, batches.largest)
        return self.loader(dataset, in_batches(sampler, micro_batch), micro_batch)

    def eval_loader(self, split: str, image_size: int, batches: EvalBatches) -> Loader:
        """The images of a split in the given batches."""
        transform = eval_transform(self.preprocess, image_size)
        dataset = ImageDataset(self.index(split), transform, image_size, intensity=self.config.intensity)
        return self.loader(dataset, batches, batches.batch_size)

    def eval_batches(self, split: str) -> EvalBatches:
        """The batches of this rank, with every image of a split once over all ranks."""
        sampler = EvalSampler(len(self.index(split)), world_size=self.info.world_size, rank=self.info.rank)
        return EvalBatches(sampler, self.eval_batch_size)

    @property
    def eval_batch_size(self) -> int:
        """Images of one forward pass of this rank in evaluation."""
        share = max(1, self.config.largest_batch_size // self.info.world_size)
        return min(share, self.config.max_local_batch_size or share)

    def batches(self, loader: Iterable[Batch], split: str) -> Iterator[Batch]:
        """The batches of a loader, on the device, with the policy applied to bad images.

        Loader processes start now, and load ahead. A batch counts as taken when it is asked for.

        Raises:
            UserError: an image can't be used, and the policy is `error`.
        """
        return to_device(self.bad_images.check(iter(loader), split, self.index(split)), self.info.device)

    def loader(self, dataset: ImageDataset, batches: Sampler[list[SampleKey]], batch_size: int) -> Loader:
        """A loader of these batches, of at most `batch_size` images, with the loader processes of this rank."""
        launch, pinned = self.info.launch, self.info.device.type == "cuda"
        plan = plan_prefetch(
            launch, choose_workers(launch, self.config.workers), batch_size * dataset.bytes_per_image,
            limit_mib=self.config.prefetch_mib, pinned=pinned,
        )  # fmt: skip
        return make_loader(
            dataset, batches, workers=plan.workers, ahead=plan.batches, pin_memory=pinned,
            seconds=self.info.batch_timeout,
        )  # fmt: skip

    def feature_loader(
        self, features: FeatureDataset, batches: Iterable[list[SampleKey]], batch_size: int
    ) -> Iterable[Batch]:
        """A loader of features in these batches, of at most `batch_size` images."""
        return feature_loader(
            features, batches, batch_size,
            launch=self.info.launch, device=self.info.device, limit_mib=self.config.prefetch_mib,
        )  # fmt: skip
