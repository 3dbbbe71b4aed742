"""The weights of a trained classifier, and what config.json beside them says of it.

config.json is that of `distil-tl export`, or of timm's `save_for_hf`. Importing this module imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.models.names import LIBRARY_CONFIG, LIBRARY_WEIGHTS, TIMM_PREFIX, WEIGHTS_SUFFIXES
from distil_tl.utils.errors import UserError
from distil_tl.utils.paths import read_text, why_no_file

Statistics = tuple[float, float, float]


@dataclass(frozen=True)
class Description:
    """What config.json says of a model; None for what it does not say.

    Attributes:
        name: of the network, as in `model.name`.
        classes: names, in the order of the logits.
        image_size: pixels.
        mean, std: per channel, of pixels scaled to 0..1.
        arguments: of the library's constructor.
    """

    name: str
    classes: list[str] | None = None
    image_size: int | None = None
    mean: Statistics | None = None
    std: Statistics | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def weights_in(path: Path) -> Path:
    """The file of weights that a path names: that of a folder which was written for a library, or the path itself."""
    return path / LIBRARY_WEIGHTS if path.is_dir() else path


def is_weights(path: Path) -> bool:
    """Whether a path is, or looks like, weights, and not a run directory."""
    if (path / "config.yaml").exists():
        return False
    return path.suffix in WEIGHTS_SUFFIXES or (path.exists() and not path.is_dir()) or weights_in(path).exists()


def weights_problem(path: Path) -> str:
    """Why there are no weights to read at a path, in words; empty if there is a file."""
    file = weights_in(path)
    if file.exists() and not file.is_file():
        return f"{file} {why_no_file(file)}; give a file of weights"
    if not file.is_file():
        return f"there is no file {file} (relative paths start at {Path.cwd()}); correct the path"
    if file.suffix not in WEIGHTS_SUFFIXES:
        return f"{file} does not end in {', '.join(WEIGHTS_SUFFIXES)}; rename or convert it"
    return ""


def description_of(path: Path) -> Description | None:
    """What config.json beside weights says; None if there is none, or it is of another kind.

    Raises:
        UserError: it can't be read, or a value in it is wrong.
    """
    file = weights_in(path).with_name(LIBRARY_CONFIG)
    if not file.exists():
        return None
    try:
        content = json.loads(read_text(file, "the description of a model"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): correct it, or move the weights to another folder") from None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None
    own, published = content.get("preprocess"), content.get("pretrained_cfg")
    is_timm = not isinstance(own, dict)
    details = own if isinstance(own, dict) else published if isinstance(published, dict) else content
    name = content["architecture"].partition(".")[0]
    arguments = content.get("model_args")
    return Description(
        name=TIMM_PREFIX + name if is_timm else name,
        classes=_classes(content, file),
        image_size=_image_size(details.get("input_size" if is_timm else "crop_size"), file),
        mean=_statistics(details, "mean", file),
        std=_statistics(details, "std", file),
        arguments=arguments if isinstance(arguments, dict) else {},
    )


def _classes(content: Mapping[str, Any], file: Path) -> list[str] | None:
    """The names of the classes, in the order of the logits."""
    names = content.get("label_names")
    if names is None:
        return None
    return class_names(names, f"{file}: label_names")


def class_names(names: Any, what: str) -> list[str]:
    """A list of names, all of them different.

    Args:
        what: the place of the list, for messages.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{what} must be a list of the names of the classes, in the order of the outputs")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{what} has {twice!r} twice; each class needs a name of its own")
    return names


def _image_size(value: Any, file: Path) -> int | None:
    """Pixels: one number, or timm's [channels, height, width]."""
    if value is None:
        return None
    side = value[-1] if isinstance(value, list) and len(value) == 3 and value[-1] == value[-2] else value
    if type(side) is not int or side < 1:
        raise UserError(f"{file}: {value!r} is not the size of square images; correct it")
    return side


def _statistics(details: Mapping[str, Any], key: str, file: Path) -> Statistics | None:
    value = details.get(key)
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) for x in value)
    if not numbers or not all(math.isfinite(x) for x in value) or (key == "std" and min(value) <= 0):
        raise UserError(f"{file}: {key} must be three numbers{' above 0' * (key == 'std')}, one for each channel")
    red, green, blue = map(float, value)
    return red, green, blue
