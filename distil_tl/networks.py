"""What a stage trains: from what its loader yields to logits, in one way of computing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distil_tl.data.transforms import Normalize
from distil_tl.models import TransferModel
from distil_tl.models.fold import folded
from distil_tl.models.split import Split
from distil_tl.precision import Compute


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


class ImageNetwork(Network):
    """A transfer model with its normalisation, on uint8 images [N, 3, S, S]."""

    def __init__(self, model: TransferModel, compute: Compute, device: torch.device) -> None:
        super().__init__(compute)
        self.normalize = Normalize(model.preprocess)
        self.module = model.module
        self.folded = self.module
        self.to(device)
        self.use(compute)

    def fold(self, image_size: int) -> ImageNetwork:
        """Run with BatchNorm folded, where that can be done, on images of this size, until called again."""
        images = any_images(3, image_size, self.normalize.mean.device)
        self.folded = folded(self.module, self.normalize(images))
        return self

    def forward(self, images: Tensor) -> Tensor:
        images = self.normalize(images).contiguous(memory_format=self.compute.memory_format)
        with self.compute.autocast(images.device):
            logits: Tensor = self.folded(images)
        return logits.float()


class Prefix(nn.Module):
    """The frozen part of an ImageNetwork: uint8 images [N, 3, S, S] to features [N, ...], without gradients."""

    def __init__(self, network: ImageNetwork, parts: Split, compute: Compute) -> None:
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

    def __init__(self, parts: Split, compute: Compute) -> None:
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
