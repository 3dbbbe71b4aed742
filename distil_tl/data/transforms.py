"""Evaluation and training transforms of an image, uint8 in and out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from distil_tl.data.augmentation import Augment, Step, augment_steps
from distil_tl.models.preprocess import Preprocess

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


def train_transform(preprocess: Preprocess, image_size: int, augment: Augment, hflip: bool) -> ImageTransform:
    """The training transform, uint8 in and out; random numbers come from torch's default CPU generator.

    `none` is `eval_transform`. Else the first step is a random crop, or `eval_transform` where there is none; the other
    steps follow in their order.

    Args:
        hflip: False leaves the flip out of a preset, for example for letters, digits, left and right hands.
    """
    steps = augment_steps(augment, hflip=hflip)
    if steps and steps[0].name == "crop":
        least, ratio = steps[0].amount, (_MIN_ASPECT_RATIO, 1 / _MIN_ASPECT_RATIO)
        crop = v2.RandomResizedCrop(
            image_size, scale=(least, 1.0), ratio=ratio, interpolation=preprocess.mode, antialias=True
        )
        base = ImageTransform([crop], min_side=math.ceil(2 * image_size / min_crop_side(augment)))
        steps = steps[1:]
    else:
        base = eval_transform(preprocess, image_size)
    return ImageTransform([*base, *(_transform(step, preprocess) for step in steps)], base.min_side)


def _transform(step: Step, preprocess: Preprocess) -> nn.Module:
    """A step after the crop, for images of the final size. What it uncovers or erases gets the mean colour."""
    fill, amount = list(preprocess.fill), step.amount
    # torchvision rotates and shears by these two alone, and refuses others.
    mode = InterpolationMode.NEAREST if preprocess.interpolation == "nearest" else InterpolationMode.BILINEAR
    made: nn.Module
    match step.name:
        case "hflip":
            made = v2.RandomHorizontalFlip(amount)
        case "vflip":
            made = v2.RandomVerticalFlip(amount)
        case "rotate":
            made = v2.RandomRotation(amount, interpolation=mode, fill=fill)
        case "color":
            made = v2.ColorJitter(brightness=amount, contrast=amount, saturation=amount)
        case "grayscale":
            made = v2.RandomGrayscale(amount)
        case "trivial":
            made = v2.TrivialAugmentWide(interpolation=mode, fill=fill)
        case "rand_augment":
            made = v2.RandAugment(num_ops=2, magnitude=int(amount), interpolation=mode, fill=fill)
        case "erasing":
            made = v2.RandomErasing(p=amount, value=[float(level) for level in fill])
        case _:
            raise ValueError(step.name)
    return made


def min_crop_side(augment: Augment) -> float:
    """The least possible shorter side of a training crop, relative to the shorter side of the image."""
    least = next((step.amount for step in augment_steps(augment, hflip=True) if step.name == "crop"), None)
    # Of all images with the same shorter side, a square one has the smallest area, and therefore the smallest crops.
    return 1.0 if least is None else math.sqrt(least * _MIN_ASPECT_RATIO)
