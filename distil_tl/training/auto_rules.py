"""The rules behind `epochs: auto`, `lr: auto` and `layer_decay: auto` of a stage."""

from __future__ import annotations

AUTO_STEPS, MIN_AUTO_EPOCHS, MAX_AUTO_EPOCHS = 600, 2, 50  # of a stage with `epochs: auto`
# `auto`: the lowest and the highest, and the skill (0: as a random choice, 1: no error) at which they hold.
AUTO_LR, AUTO_LAYER_DECAY, AUTO_SKILL = (3e-4, 1e-3), (0.9, 1.0), (0.7, 0.5)


def auto_epochs(steps_per_epoch: int) -> int:
    """What `epochs: auto` is for a number of optimizer steps in an epoch. docs/length.md has the table."""
    return max(MIN_AUTO_EPOCHS, min(MAX_AUTO_EPOCHS, round(AUTO_STEPS / steps_per_epoch)))


def auto_lr(top1: float | None, classes: int) -> float:
    """What `lr: auto` is after a stage that reached `top1` on val (None: there was none). See docs/recipes.md.

    The better the classes are told apart already, the less the layers below should change.
    """
    low, high = AUTO_LR
    share = _share(top1, classes)
    return float(f"{low ** (1 - share) * high**share:.3g}")


def auto_layer_decay(top1: float | None, classes: int) -> float:
    """What `layer_decay: auto` is, in the same way: 1 where the lower layers have to change as much as the others."""
    low, high = AUTO_LAYER_DECAY
    return round(low + _share(top1, classes) * (high - low), 3)


def _share(top1: float | None, classes: int) -> float:
    """From 0, where much was learned, to 1. A random choice has skill 0, so the number of classes does not matter."""
    if top1 is None or classes < 2:
        return 0.0
    skill = (top1 - 1 / classes) / (1 - 1 / classes)
    high, low = AUTO_SKILL
    return min(1.0, max(0.0, (high - skill) / (high - low)))
