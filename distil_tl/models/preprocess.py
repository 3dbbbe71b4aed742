"""Preprocessing that belongs to a set of weights: resize, crop and normalisation.

Images stay uint8 up to the batch; `Normalize` runs on the device of the model, on a whole batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from distil_tl.utils.errors import UserError

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
        crop_mode: what is resized before the centre crop: center (the shorter side), squash (both sides, so that
            proportions change), border (the longer side; the rest is filled).
        crop_pct: side of the crop relative to the side that is resized, as in timm; None: the proportion of
            `crop_size` and `resize_size`.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_size: int = 224
    resize_size: int = 256
    crop_mode: str = "center"
    crop_pct: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields; those of the crop only where they are set, as earlier code knows none."""
        unset = {field.name: field.default for field in fields(self) if field.name in ("crop_mode", "crop_pct")}
        return {name: value for name, value in asdict(self).items() if name not in unset or value != unset[name]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Preprocess:
        """The inverse of `to_json` after JSON, which turns tuples into lists.

        Raises:
            UserError: a later version of the package wrote it.
        """
        if unknown := tree.keys() - {field.name for field in fields(cls)}:
            raise UserError(
                f"the checkpoint has a preprocessing that this version of distil_tl does not know "
                f"({', '.join(sorted(unknown))}); use the version that trained it"
            )
        return cls(**{**tree, "mean": tuple(tree["mean"]), "std": tuple(tree["std"])})

    def with_crop(self, mode: str, share: float | None) -> Preprocess:
        """The same with `data.crop_mode` and `data.crop_pct`. `auto` keeps the mode."""
        if mode == "auto":
            return self if share is None else replace(self, crop_pct=share)
        if mode == "weights":
            return replace(self, crop_mode="center", crop_pct=share)
        return replace(self, crop_mode=mode, crop_pct=1.0 if share is None else share)

    def resize_for(self, image_size: int) -> int:
        """Length in pixels before a centre crop of `image_size`, of the side or sides that `crop_mode` resizes."""
        if self.crop_pct is not None:
            return max(image_size, math.floor(image_size / self.crop_pct))
        return max(image_size, round(image_size * self.resize_size / self.crop_size))

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour of borders: the mean of the weights, as uint8."""
        red, green, blue = (round(255 * level) for level in self.mean)
        return red, green, blue

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
