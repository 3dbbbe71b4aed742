"""The names of augmentations: presets and lists of steps such as [crop(0.3),hflip,trivial], without torch."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, TypeAlias

from distil_tl.utils.errors import did_you_mean

Augment: TypeAlias = "str | list[str]"  # `data.augment`: none, a preset, or steps

PRESETS = {
    "flip": ["hflip"],
    "light": ["crop(0.5)", "hflip"],
    "strong": ["crop(0.2)", "hflip", "trivial", "erasing(0.1)"],
}
AUGMENTATIONS = ("none", *PRESETS)
EXAMPLE = "[crop(0.3),hflip,trivial]"


class Step(NamedTuple):
    """One step of an augmentation, such as crop(0.3)."""

    name: str
    amount: float


class Kind(NamedTuple):
    """What the number of a step means, its default and its range."""

    default: float
    least: float
    most: float
    meaning: str


# docs/augmentation.md describes them, with their sources.
KINDS = {
    "crop": Kind(0.5, 0.01, 1, "the least share of the area"),
    "hflip": Kind(0.5, 0, 1, "a probability"),
    "vflip": Kind(0.5, 0, 1, "a probability"),
    "rotate": Kind(15, 0, 180, "degrees to both sides"),
    "color": Kind(0.4, 0, 1, "the largest change of brightness, contrast and saturation"),
    "grayscale": Kind(0.1, 0, 1, "a probability"),
    "trivial": Kind(0, 0, 0, "none"),
    "rand_augment": Kind(9, 0, 30, "the strength, a whole number"),
    "erasing": Kind(0.25, 0, 1, "a probability"),
}


def augment_steps(augment: Augment, *, hflip: bool) -> list[Step]:
    """The steps of a valid augmentation, a crop first; none for `none`.

    Args:
        hflip: `data.hflip`; without it, a preset does not mirror images.
    """
    if isinstance(augment, str):
        steps = [] if augment == "none" else [_parse(text) for text in PRESETS[augment]]
        return [step for step in steps if hflip or step.name != "hflip"]
    return sorted(map(_parse, augment), key=lambda step: step.name != "crop")


def effective(augment: Augment, *, hflip: bool) -> Augment:
    """The augmentation, or `none` where it has no step, as `flip` has none without `data.hflip`."""
    is_preset = isinstance(augment, str) and augment in PRESETS
    return "none" if is_preset and not augment_steps(augment, hflip=hflip) else augment


def auto_augment(crop_mode: str, *, hflip: bool) -> str:
    """What `data.augment=auto` is for a resolved `data.crop_mode`, and `data.hflip`.

    Random crops show parts of images in their own proportions. Where evaluation squashes whole images, these are no
    views of the same kind, and cost accuracy (docs/recipes.md). Where images may not be mirrored, flips are no
    augmentation.
    """
    return "flip" if crop_mode == "squash" and hflip else "light"


def augment_text(augment: Any) -> str:
    """An augmentation as a person writes it."""
    return f"[{','.join(map(str, augment))}]" if isinstance(augment, list) else str(augment)


def augment_problem(augment: Any, key: str, *, hflip: bool = True) -> str | None:
    """Why a value can't be `data.augment`, or `stages.NAME.augment`; None if it can.

    Args:
        hflip: `data.hflip`.
    """
    named = (*(["auto"] if key == "data.augment" else []), *AUGMENTATIONS)
    if isinstance(augment, str) and augment in named:
        return None
    if not isinstance(augment, list):
        choices = f"choose one of {', '.join(named)}, or a list of steps such as {EXAMPLE}"
        choices += "" if key == "data.augment" else ", or null for that of data.augment"
        if isinstance(augment, str) and augment.partition("(")[0] in KINDS:
            choices = f"a step is written in a list: {key}=[{augment}]"
        hint = did_you_mean(augment, named) if isinstance(augment, str) else ""
        return f"{key} is {augment!r}{hint}; {choices}"
    if not augment:
        return f"{key} is an empty list; write {key}=none"
    if preset := next((item for item in augment if isinstance(item, str) and item in PRESETS), None):
        return f"{key}: {preset} is not a step but a list of steps: write {key}={_spelled_out(augment, hflip=hflip)}"
    names = [str(item).partition("(")[0] for item in augment]
    for item, name in zip(augment, names, strict=True):
        if problem := _step_problem(item, name):
            return f"{key}: {problem}"
        if names.count(name) > 1:
            return f"{key} has the step {name} twice; remove one"
    if "hflip" in names and not hflip:
        return f"{key} has the step hflip, but data.hflip=false; remove one of them"
    return None


def _spelled_out(augment: list[Any], *, hflip: bool) -> str:
    """A list of steps with those of its presets in their place, each step once."""
    steps = [step for item in map(str, augment) for step in PRESETS.get(item, [item])]
    named = {step.partition("(")[0]: step for step in reversed(steps)}  # the first of a name
    found = [step for name, step in reversed(named.items()) if hflip or name != "hflip"]
    return f"[{','.join(found)}]" if found else "none"


def _step_problem(item: Any, name: str) -> str | None:
    kind = KINDS.get(name) if isinstance(item, str) else None
    if kind is None:
        return f"there is no step {item!r}{did_you_mean(name, list(KINDS))} (steps are {', '.join(KINDS)})"
    try:
        amount = _parse(item).amount
    except ValueError:
        amount = math.nan
    if kind.meaning == "none" and item != name:
        return f"{name} takes no number; write {name}"
    valid = kind.least <= amount <= kind.most  # NaN is not
    if not valid or (name == "rand_augment" and amount != int(amount)):
        return f"the number of {item!r} must be from {kind.least:g} to {kind.most:g}: {kind.meaning}"
    return None


def _parse(text: str) -> Step:
    """Raises ValueError if it is not NAME or NAME(NUMBER)."""
    found = re.fullmatch(r"(\w+)(?:\(\s*([^()\s]+)\s*\))?", text)
    if found is None:
        raise ValueError(text)
    return Step(found[1], KINDS[found[1]].default if found[2] is None else float(found[2]))
