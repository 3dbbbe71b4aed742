"""The rules behind `epochs: auto` and `lr: auto` of a stage."""

from __future__ import annotations

AUTO_STEPS, MIN_AUTO_EPOCHS, MAX_AUTO_EPOCHS = 600, 2, 50  # of a stage with `epochs: auto`
# `lr: auto`: the lowest and the highest, and the skill (0: as a random choice, 1: no error) at which they hold.
AUTO_LR, AUTO_LR_SKILL = (3e-4, 1e-3), (0.7, 0.5)


def auto_epochs(steps_per_epoch: int) -> int:
    """What `epochs: auto` is for a number of optimizer steps in an epoch. docs/length.md has the table."""
    return max(MIN_AUTO_EPOCHS, min(MAX_AUTO_EPOCHS, round(AUTO_STEPS / steps_per_epoch)))


def auto_lr(top1: float | None, classes: int) -> float:
    """What `lr: auto` is after a stage that reached `top1` on val (None: there was none). See docs/recipes.md.

    The better the classes are told apart already, the less the layers below should change. `top1` is compared with
    that of a random choice, so that the number of classes does not matter.
    """
    if top1 is None or classes < 2:
        return AUTO_LR[0]
    skill = (top1 - 1 / classes) / (1 - 1 / classes)
    high, low = AUTO_LR_SKILL
    share = min(1.0, max(0.0, (high - skill) / (high - low)))
    return float(f"{AUTO_LR[0] ** (1 - share) * AUTO_LR[1] ** share:.3g}")
