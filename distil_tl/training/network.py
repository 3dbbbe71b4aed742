"""What a stage trains: from what its loader yields to logits, in one way of computing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distil_tl.models.graph.fold_batchnorm import CannotFoldError, ConvNorm, fold_batchnorm
from distil_tl.models.graph.frozen_prefix import CutNetwork
from distil_tl.models.preprocess import Normalize
from distil_tl.models.transfer import TransferModel
from distil_tl.training.precision import Compute
from distil_tl.utils.log import logger


def any_images(count: int, size: int, device: torch.device) -> Tensor:
    """Images uint8 [count, 3, size, size] to try a network on, always the same, and of no meaning."""
    drawn = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return drawn.to(device)


class Network(nn.Module):
    """A batch of what a loader yields to float32 logits [N, C]."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute

    def use(self, compute: Compute) -> None:
        """Compute in another way from now on. Parameters stay the same objects."""
        self.compute = compute
        self.to(memory_format=compute.memory_format)
        # In less than float32 the gradients of BatchNorm's scales would be made of rounded sums.
        folds = compute.dtype is None and self.folds_at_each_call
        for part in self.modules():
            if isinstance(part, ConvNorm):
                part.folds = folds

    @property
    def folds_at_each_call(self) -> bool:
        """Whether that pays: on CPUs it was found to."""
        return next(self.parameters()).device.type == "cpu"


class ImageNetwork(Network):
    """A transfer model with its normalisation, on uint8 images [N, 3, S, S]."""

    def __init__(self, model: TransferModel, compute: Compute, device: torch.device) -> None:
        super().__init__(compute)
        self.normalize = Normalize(model.preprocess)
        self.module = model.module  # before what shares its layers: DDP and trackers take the first name of each
        self.folded: nn.Module | None = None
        self.folded_size = 0
        self.to(device)
        self.use(compute)

    def fold(self, image_size: int, *, trains: bool = False, wanted: bool = True) -> ImageNetwork:
        """Fold BatchNorm into convolutions where that is wanted, pays and can be done, for images of this size.

        Args:
            trains: whether it will run in training mode, too.
        """
        self.folded = None
        if wanted and self.folds_at_each_call and any(isinstance(part, _BatchNorm) for part in self.module.modules()):
            images = self.normalize(any_images(3, image_size, self.normalize.mean.device))
            try:
                self.folded, self.folded_size = fold_batchnorm(self.module, images, trains=trains), image_size
            except CannotFoldError as reason:
                logger.info("BatchNorm is not folded into convolutions: %s", reason)
        self.use(self.compute)
        return self

    def forward(self, images: Tensor) -> Tensor:
        folded = self.folded if images.shape[-1] == self.folded_size else None
        images = self.normalize(images).contiguous(memory_format=self.compute.memory_format)
        with self.compute.autocast(images.device):
            logits: Tensor = (self.module if folded is None else folded)(images)
        return logits.float()


class Prefix(nn.Module):
    """The frozen part of an ImageNetwork: uint8 images [N, 3, S, S] to features [N, ...], without gradients."""

    def __init__(self, network: ImageNetwork, parts: CutNetwork, compute: Compute) -> None:
        super().__init__()
        self.normalize = network.normalize
        self.prefix = parts.prefix
        self.use(compute)

    def use(self, compute: Compute) -> None:
        self.compute = compute
        self.to(memory_format=compute.memory_format)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = self.normalize(images).contiguous(memory_format=self.compute.memory_format)
        with self.compute.autocast(images.device):
            features: Tensor = self.prefix(images)
        return features


class FeatureNetwork(Network):
    """What is left of an ImageNetwork to run on features [N, ...]: all from the first trained layer on."""

    def __init__(self, parts: CutNetwork, compute: Compute) -> None:
        super().__init__(compute)
        self.suffix = parts.suffix
        self.use(compute)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            features = features.contiguous(memory_format=self.compute.memory_format)
        if self.compute.dtype is None:
            features = features.float()
        with self.compute.autocast(features.device):
            logits: Tensor = self.suffix(features)
        return logits.float()


class SplitNetwork(Network):
    """An ImageNetwork whose frozen part runs without gradients, folded, and in a way of its own."""

    def __init__(self, prefix: Prefix, rest: FeatureNetwork) -> None:
        super().__init__(rest.compute)
        self.prefix = prefix
        self.rest = rest

    def use(self, compute: Compute) -> None:
        self.compute = compute
        self.rest.use(compute)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.rest(self.prefix(images))
        return logits
