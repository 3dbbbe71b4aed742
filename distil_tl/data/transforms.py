"""Evaluation and training transforms of an image, uint8 in and out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from distil_tl.models.preprocess import Preprocess

_MIN_CROP_AREA = {"light": 0.5, "strong": 0.2}  # relative to the area of the image
_MIN_ASPECT_RATIO = 3 / 4  # of a crop, shorter to longer side


class ImageTransform(nn.Sequential):
    """The transforms from a decoded image to the model's input, and the size of the image that they need.

    `min_side` is a length in pixels of the shorter side of an image: from it, even the smallest crop has at least two
    pixels for each pixel of the output. A larger image may be decoded at a reduced size, down to `min_side`.
    """

    def __init__(self, steps: list[nn.Module], min_side: int) -> None:
        super().__init__(*steps)
        self.min_side = min_side


def eval_transform(preprocess: Preprocess, image_size: int) -> ImageTransform:
    """uint8 [3, H, W] of any size to uint8 [3, image_size, image_size]: resize as the crop mode says, crop the centre.

    The same sizes and positions as in timm's transform of the same `crop_mode` and `crop_pct`.
    """
    resized = preprocess.resize_for(image_size)
    if preprocess.crop_mode == "border":
        steps: list[nn.Module] = [ResizeLonger(resized, preprocess.mode), CropOrPad(image_size, preprocess.fill)]
    else:
        size = [resized, resized] if preprocess.crop_mode == "squash" else resized
        steps = [v2.Resize(size, interpolation=preprocess.mode, antialias=True), v2.CenterCrop(image_size)]
    return ImageTransform(steps, min_side=2 * resized)  # for border, this is more than enough


class ResizeLonger(nn.Module):
    """Resizes the longer side of an image to `side` pixels, and keeps its proportions."""

    def __init__(self, side: int, mode: InterpolationMode) -> None:
        super().__init__()
        self.side, self.mode = side, mode

    def forward(self, image: Tensor) -> Tensor:
        scale = max(image.shape[1:]) / self.side
        size = [max(1, round(length / scale)) for length in image.shape[1:]]
        resized: Tensor = v2.functional.resize(image, size, interpolation=self.mode, antialias=True)
        return resized


class CropOrPad(nn.Module):
    """The centre of an image uint8 [3, H, W] as [3, size, size]; what is missing at the sides has the colour `fill`."""

    def __init__(self, size: int, fill: tuple[int, int, int]) -> None:
        super().__init__()
        self.size, self.fill = size, fill

    def forward(self, image: Tensor) -> Tensor:
        height, width = (min(length, self.size) for length in image.shape[1:])
        centre: Tensor = v2.functional.center_crop(image, [height, width])
        if height == width == self.size:
            return centre
        square = torch.tensor(self.fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, self.size, self.size)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        square[:, top : top + height, left : left + width] = centre
        return square


def train_transform(preprocess: Preprocess, image_size: int, augment: str, hflip: bool) -> ImageTransform:
    """The training transform, uint8 in and out; random numbers come from torch's default CPU generator.

    `none` is `eval_transform`. `light` is a random resized crop (at least half the area) and a random horizontal flip.
    `strong` crops down to a fifth of the area, and adds TrivialAugment (Mueller and Hutter, 2021) and random erasing
    (Zhong et al., 2017). `hflip=False` omits the flip, for example for letters, digits, left and right hands.
    """
    if augment == "none":
        return eval_transform(preprocess, image_size)
    scale, ratio = (_MIN_CROP_AREA[augment], 1.0), (_MIN_ASPECT_RATIO, 1 / _MIN_ASPECT_RATIO)
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(image_size, scale=scale, ratio=ratio, interpolation=preprocess.mode, antialias=True)
    ]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if augment == "strong":
        fill = [round(255 * m) for m in preprocess.mean]
        steps.append(v2.TrivialAugmentWide(interpolation=preprocess.mode, fill=fill))
        steps.append(v2.RandomErasing(p=0.1, value=[float(level) for level in fill]))
    return ImageTransform(steps, min_side=math.ceil(2 * image_size / min_crop_side(augment)))


def min_crop_side(augment: str) -> float:
    """The least possible shorter side of a training crop, relative to the shorter side of the image."""
    # Of all images with the same shorter side, a square one has the smallest area, and therefore the smallest crops.
    return 1.0 if augment == "none" else math.sqrt(_MIN_CROP_AREA[augment] * _MIN_ASPECT_RATIO)
