"""Mixup and CutMix: which part of two images a training image has, as a function of its place in the epoch.

The partner of an image is another one of its global batch (`TrainSampler.partner`). Its share and box are drawn from a
seed of their own. So pairs, shares and boxes are the same on any number of ranks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

NO_BOX = (0, 0, 0, 0)
SWITCH = 0.5  # chance of mixup where a stage has both


class Partners(NamedTuple):
    """What the images of a batch are mixed with: a row for each of its first N images.

    Attributes:
        rows: int64 [N], the position of the partner among the images of the batch, which may have more than N.
        targets: int64 [N], of the partner.
        indices: int64 [N], of the partner in the index.
        shares: float32 [N], of the image itself; the partner has the rest.
        boxes: int32 [N, 4], top, left, bottom and right of the part that is the partner's; all 0 for mixup.
    """

    rows: Tensor
    targets: Tensor
    indices: Tensor
    shares: Tensor
    boxes: Tensor


class Drawn(NamedTuple):
    """The share of an image itself, and the box that is its partner's: top, left, bottom, right."""

    share: float
    box: tuple[int, int, int, int]


UNMIXED = Drawn(1.0, NO_BOX)


@dataclass(frozen=True)
class Mixing:
    """How a stage mixes its images.

    Attributes:
        mixup, cutmix: alpha of the Beta distribution of the share; 0: not used.
        epochs: the first ones of the stage, in which images are mixed.
    """

    mixup: float
    cutmix: float
    epochs: int

    def draw(self, seed: int, size: int) -> Drawn:
        """The share and box of an image of `size` pixels to both sides."""
        draw = random.Random(seed)
        cuts = self.cutmix > 0 and not (self.mixup > 0 and draw.random() < SWITCH)
        alpha = self.cutmix if cuts else self.mixup
        share = draw.betavariate(alpha, alpha)
        return cut(share, draw.randrange(size), draw.randrange(size), size) if cuts else Drawn(share, NO_BOX)


def cut(share: float, x: int, y: int, size: int) -> Drawn:
    """The box of CutMix around a pixel, and the share of the image that is left of it (Yun et al., 2019).

    Args:
        share: 1 less the area of the whole box, which may reach over the edges.
    """
    half = int(0.5 * math.sqrt(1 - share) * size)
    top, left, bottom, right = max(0, y - half), max(0, x - half), min(size, y + half), min(size, x + half)
    return Drawn(1 - (bottom - top) * (right - left) / size**2, (top, left, bottom, right))
