"""A look at the values of 16-bit and float images, of which 8 bits may keep too little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from distil_tl.data.pillow import Intensity, grey_to_8_bits, has_deep_colour, is_deep, open_image

HEADERS = 32  # images of which the header is read
LOADED = 8  # of these, 16-bit and float images of which the values are looked at
MAX_PIXELS = 20_000_000  # of an image that is looked at
FEW_LEVELS = 64  # of the 256 levels of 8 bits


class _Values(NamedTuple):
    """The values of an image in its file, and how many levels of grey they become."""

    low: float
    high: float
    levels: int
    colour: bool
    whole: bool  # integers


def intensity_warning(length: int, path: Callable[[int], Path], intensity: Intensity) -> str | None:
    """A warning if 8 bits keep little of the values of 16-bit or float images; None if all is well.

    Args:
        length: number of images.
        path: of an image by its number. A few are read, from the whole range.
        intensity: as `data.intensity`.
    """
    chosen = np.unique(np.linspace(0, max(0, length - 1), min(HEADERS, length)).astype(int)).tolist()
    found: list[_Values] = []
    for i in chosen:
        if len(found) < LOADED and (values := _look_at(path(i), intensity)) is not None:
            found.append(values)
    grey, colour = ([each for each in found if each.colour is kind] for kind in (False, True))
    key = "data.intensity=" + (intensity if isinstance(intensity, str) else f"[{intensity[0]:g},{intensity[1]:g}]")
    if intensity != "dtype" and chosen and not grey:
        return f"{key} has no effect on the images looked at: it scales 16-bit grey and float images only"
    if _mostly_few(grey) or (intensity == "dtype" and any(each.low < 0 for each in grey)):
        low, high = min(each.low for each in grey), max(each.high for each in grey)
        negative = ", and values below 0 become black" if intensity == "dtype" and low < 0 else ""
        return (
            f"the 16-bit or float images have values from {low:,g} to {high:,g}, of which {key} keeps "
            f"{max(each.levels for each in grey)} of 256 levels of grey{negative}. Set data.intensity=percentile, or "
            f"the values that become black and white, such as data.intensity={_suggestion(low, high, grey)}"
        )
    if _mostly_few(colour):
        return (
            f"of images with 16 bits per colour only the high bytes are used, which here have at most "
            f"{max(each.levels for each in colour)} of 256 levels. data.intensity does not scale colours: convert them "
            f"to 8 bits"
        )
    return None


def _look_at(path: Path, intensity: Intensity) -> _Values | None:
    """The values of a 16-bit or float image; None for others, and for a file that can't be read."""
    try:
        with path.open("rb") as file:
            image = open_image(file)
            if image is None or image.width * image.height > MAX_PIXELS:
                return None
            if has_deep_colour(image):
                image.load()
                return _colour(image)
            return _grey(image, intensity) if is_deep(image) else None
    except MemoryError:
        raise
    except Exception:  # a damaged file, which is reported when it is used
        return None


def _grey(image: Image.Image, intensity: Intensity) -> _Values | None:
    image.load()
    values: np.ndarray[Any, Any] = np.asarray(image)
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    levels = grey_to_8_bits(image, intensity)[np.isfinite(values)]
    span = int(levels.max()) - int(levels.min()) + 1
    return _Values(float(known.min()), float(known.max()), span, colour=False, whole=image.mode != "F")


def _colour(image: Image.Image) -> _Values:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    return _Values(low, high, high - low + 1, colour=True, whole=True)


def _mostly_few(found: Sequence[_Values]) -> bool:
    """Whether most images keep few levels. Single images may have one level only, such as an empty slice."""
    return sum(each.levels <= FEW_LEVELS for each in found) * 2 > len(found)


def _suggestion(low: float, high: float, found: Sequence[_Values]) -> str:
    """A range for `data.intensity` that holds the values: for unsigned integers, all of their bits."""
    if all(each.whole for each in found) and low >= 0:
        return f"[0,{2 ** int(high).bit_length() - 1}]"
    return f"[{low:g},{high:g}]"
