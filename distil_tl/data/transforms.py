"""Preprocessing that belongs to a set of weights, and the augmentations built around it.

Everything up to the batch stays uint8; `Normalize` runs where the model runs, on a whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """What a set of weights expects of its input.

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
        """The way back from `dataclasses.asdict` by way of JSON, which has no tuples."""
        return cls(**{**tree, "mean": tuple(tree["mean"]), "std": tuple(tree["std"])})

    def resize_for(self, image_size: int) -> int:
        """Shorter side before a centre crop of `image_size`, in the weights' own proportion."""
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


_SMALLEST_CROP = {"light": 0.5, "strong": 0.2}  # share of the image's area
_NARROWEST_CROP = 3 / 4  # of its own sides, the shorter to the longer


class View(nn.Sequential):
    """Steps from a decoded image to what the model sees, and how large an image they need.

    `enough` is a shorter side in pixels of which the steps, at their closest crop, still use two pixels or more for
    each that they make: a larger image may be decoded at a fraction of its size, down to that.
    """

    def __init__(self, steps: list[nn.Module], enough: int) -> None:
        super().__init__(*steps)
        self.enough = enough


def eval_transform(preprocess: Preprocess, image_size: int) -> View:
    """uint8 [3, H, W] of any size to uint8 [3, image_size, image_size]: resize the shorter side, crop the centre."""
    resized = preprocess.resize_for(image_size)
    steps = [v2.Resize(resized, interpolation=preprocess.mode, antialias=True), v2.CenterCrop(image_size)]
    return View(steps, enough=2 * resized)


def train_transform(preprocess: Preprocess, image_size: int, augment: str, hflip: bool) -> View:
    """The training view of an image, uint8 in and out; random draws come from torch's default CPU generator.

    `none` is the evaluation view. `light` is a random resized crop (at least half the area) and a mirror image.
    `strong` crops down to a fifth, adds TrivialAugment (Mueller and Hutter, 2021) and random erasing
    (Zhong et al., 2017). `hflip=False` leaves out the mirror image, for letters, digits, left and right hands.
    """
    if augment == "none":
        return eval_transform(preprocess, image_size)
    scale, ratio = (_SMALLEST_CROP[augment], 1.0), (_NARROWEST_CROP, 1 / _NARROWEST_CROP)
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(image_size, scale=scale, ratio=ratio, interpolation=preprocess.mode, antialias=True)
    ]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if augment == "strong":
        fill = [round(255 * m) for m in preprocess.mean]
        steps.append(v2.TrivialAugmentWide(interpolation=preprocess.mode, fill=fill))
        steps.append(v2.RandomErasing(p=0.1, value=[float(level) for level in fill]))
    return View(steps, enough=math.ceil(2 * image_size / closest_crop(augment)))


def closest_crop(augment: str) -> float:
    """The shorter side that a crop of the training view has at least, as a share of the image's shorter side."""
    # Of all images of the same shorter side, a square one has the smallest area, and so the smallest crops.
    return 1.0 if augment == "none" else math.sqrt(_SMALLEST_CROP[augment] * _NARROWEST_CROP)
