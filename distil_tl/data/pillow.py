"""Images by Pillow, without torch: the formats that are read, and how an image of any mode becomes uint8 RGB, upright.

decode.py has the rules.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

Intensity: TypeAlias = "str | Sequence[float]"  # data.intensity: dtype, percentile, or [low, high]
Pixels: TypeAlias = "npt.NDArray[np.uint8]"
Value = TypeVar("Value", bound=np.generic)

# The formats found in files with image extensions. Few on purpose: some other plugins of Pillow start programs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
INSTALL = "pip install 'distil_tl[decode]'"  # what reads all formats
PERCENTILES = (0.5, 99.5)  # of data.intensity=percentile

# About metadata and palettes, which do not change the pixels here; once for each loader process and place in Pillow.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def open_image(file: IO[bytes]) -> Image.Image | None:
    """The image with only its header read; None if it has no known format.

    Like `Image.open`, but without its check of the size: its limit is global to the process, so other code could
    change it.
    """
    prefix = file.read(16)
    for name in plugins():
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if accepted and not isinstance(accepted, str):  # a string says why a plugin is not usable
            file.seek(0)
            return factory(file, "")
    return None


@functools.cache
def plugins() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names."""
    Image.init()
    heif_plugin()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def heif_plugin() -> str | None:
    """Register a plugin of Pillow that reads HEIC. Returns its name with its version; None if there is none."""
    for module in ("pi_heif", "pillow_heif"):
        with suppress(ImportError):
            plugin = importlib.import_module(module)
            plugin.register_heif_opener()
            return f"{module} {plugin.__version__}"
    return None


def unknown_format(data: bytes) -> str:
    """Why the content of a file is not an image that `open_image` knows."""
    if data[4:8] == b"ftyp":
        for name, brands in (("AVIF", (b"avif", b"avis")), ("HEIC", (b"heic", b"heix", b"heim", b"heis", b"mif1"))):
            if any(brand in data[8:32] for brand in brands):
                return f"{name}, for which no decoder is installed: {INSTALL}"
    return f"not a readable image ({', '.join(plugins())})"


def pixels_of(image: Image.Image, intensity: Intensity = "dtype") -> Pixels:
    """An opened image as uint8 [H, W, 3]: RGB, upright. Raises Pillow's errors for damaged images."""
    image.load()
    return upright(np.array(to_rgb(image, intensity)), image)


def upright(pixels: npt.NDArray[Value], source: Image.Image) -> npt.NDArray[Value]:
    """`pixels` [H, W, C] rotated and mirrored according to the EXIF data of `source`."""
    try:
        orientation = int(source.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata of an intact image
        return pixels
    if not 2 <= orientation <= 8:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    mirrored = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    # A copy also of one row or column, which counts as contiguous: torch takes no negative strides.
    turned: npt.NDArray[Value] = np.flip(pixels, mirrored).copy()
    return turned


def is_deep(image: Image.Image) -> bool:
    """Whether an image is 16-bit grey, 32-bit integers or floats, which `data.intensity` scales."""
    return image.mode == "F" or image.mode.startswith("I")


def has_deep_colour(image: Image.Image) -> bool:
    """Whether a file that is not loaded yet has 16 bits per channel, of which Pillow reads the high byte."""
    tiles = getattr(image, "tile", None) or ()
    arguments = [argument for tile in tiles for argument in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    return not is_deep(image) and any(isinstance(argument, str) and ";16" in argument for argument in arguments)


def to_rgb(image: Image.Image, intensity: Intensity = "dtype") -> Image.Image:
    """A loaded image of any mode, in mode RGB."""
    if is_deep(image):
        return Image.fromarray(grey_to_8_bits(image, intensity)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image)
        return background
    return image if image.mode == "RGB" else image.convert("RGB")


def grey_to_8_bits(image: Image.Image, intensity: Intensity = "dtype") -> Pixels:
    """The values of a loaded image of mode I;16*, I or F as uint8 [H, W]."""
    values: npt.NDArray[Any] = np.asarray(image)
    if intensity == "dtype" and image.mode == "F":
        white = white_of(values)
        grey = np.rint(np.nan_to_num(values, nan=0).clip(0, white) * (255 / white))
    elif intensity == "dtype":
        grey = (values.clip(0, 65535).astype(np.uint32) + 128) // 257
    else:
        low, high = _percentiles(values) if isinstance(intensity, str) else intensity
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        grey = np.rint(np.nan_to_num(scaled.clip(0, 255), nan=0))
    if image.mode != "F" and "transparency" in image.info:  # the value that means transparent
        grey[values == image.info["transparency"]] = 255
    eight_bits: Pixels = grey.astype(np.uint8)
    return eight_bits


def white_of(values: npt.NDArray[np.floating]) -> int:
    """The value that means white in a float image, by its largest value."""
    top = np.max(values, where=np.isfinite(values), initial=0)
    return 1 if top <= 1 else 255 if top <= 255 else 65535


def _percentiles(values: npt.NDArray[np.generic]) -> tuple[float, float]:
    """Black and white of one image. Where most values are equal, its smallest and its largest value."""
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, PERCENTILES)
    if low == high:
        low, high = known.min(), known.max()
    return (float(low), float(high)) if low < high else (float(low), float(low) + 1.0)
