"""The rules behind `epochs: auto`, `lr: auto` and `layer_decay: auto` of a stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

AUTO_STEPS, MIN_AUTO_EPOCHS, MAX_AUTO_EPOCHS = 600, 2, 50  # of a stage with `epochs: auto`
# What `auto` is by skill (0: as a random choice, 1: no error), with straight lines between; for `lr`, of its logarithm.
AUTO_LR = ((0.1, 5e-4), (0.2, 1e-3), (0.5, 1e-3), (0.7, 3e-4))
AUTO_LAYER_DECAY = ((0.5, 1.0), (0.7, 0.9))


def auto_epochs(steps_per_epoch: int) -> int:
    """What `epochs: auto` is for a number of optimizer steps in an epoch. docs/length.md has the table."""
    return max(MIN_AUTO_EPOCHS, min(MAX_AUTO_EPOCHS, round(AUTO_STEPS / steps_per_epoch)))


def auto_lr(top1: float | None, classes: int) -> float:
    """What `lr: auto` is after a stage that reached `top1` on val (None: there was none). See docs/recipes.md.

    The better the classes are told apart already, the less the layers below should change. After a head that has
    learned next to nothing the highest rate can end in a network with the same output for all images.
    """
    return float(f"{math.exp(_at(_skill(top1, classes), [(skill, math.log(lr)) for skill, lr in AUTO_LR])):.3g}")


def auto_layer_decay(top1: float | None, classes: int) -> float:
    """What `layer_decay: auto` is, in the same way: 1 where the lower layers have to change as much as the others."""
    return round(_at(_skill(top1, classes), AUTO_LAYER_DECAY), 3)


def _skill(top1: float | None, classes: int) -> float:
    """A random choice has skill 0, so the number of classes does not matter; 1 if nothing is known."""
    return 1.0 if top1 is None or classes < 2 else (top1 - 1 / classes) / (1 - 1 / classes)


def _at(x: float, points: Sequence[tuple[float, float]]) -> float:
    """The value at `x` on straight lines between points, in order of x; beyond them, that of the first or the last."""
    for (left, before), (right, after) in itertools.pairwise(points):
        if x < right:
            share = max(0.0, (x - left) / (right - left))
            return before + share * (after - before)
    return points[-1][1]
