"""Preprocessing that belongs to a set of weights: resize, crop and normalisation.

Images stay uint8 up to the batch; `Normalize` runs on the device of the model, on a whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing that a set of weights expects.

    Attributes:
        mean, std: per channel, of pixels scaled to 0..1.
        interpolation: a name of `torchvision.transforms.InterpolationMode`, such as "bilinear".
        crop_size: side of the square image in pixels that the weights were evaluated at.
        resize_size: length of the shorter side in pixels before the centre crop.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_size: int = 224
    resize_size: int = 256

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Preprocess:
        """The inverse of `dataclasses.asdict` after JSON, which turns tuples into lists."""
        return cls(**{**tree, "mean": tuple(tree["mean"]), "std": tuple(tree["std"])})

    def resize_for(self, image_size: int) -> int:
        """Shorter side in pixels before a centre crop of `image_size`, in the same proportion as for `crop_size`."""
        return max(image_size, round(image_size * self.resize_size / self.crop_size))

    @property
    def mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)


class Normalize(nn.Module):
    """uint8 images [N, 3, H, W] to float32, scaled to 0..1 and standardised per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.float().sub(self.mean).div_(self.std)
