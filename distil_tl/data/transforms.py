"""Evaluation and training transforms of an image, uint8 in and out."""

from __future__ import annotations

import math

from torch import nn
from torchvision.transforms import v2

from distil_tl.models.preprocess import Preprocess

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
