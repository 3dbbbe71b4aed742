"""The one image decoder: every file becomes uint8 RGB, by the rules below and by nothing else.

- EXIF orientation is applied. Colour profiles are not: numbers are taken as sRGB.
- Transparency, in whichever form the format has it, is composited onto white.
- 16-bit grey is divided by 257 and rounded. 32-bit integers (mode I, as which Pillow also reads 16-bit PGM)
  are taken as 16-bit values, clipped to 0..65535. Floats (mode F) have no range of their own: white is the
  first of 1, 255 and 65535 that the image's largest value does not exceed, else 65535; what is below 0 or NaN
  is black.
- 16 bits per colour channel, palettes, 1-bit, CMYK, YCCK, YCbCr, LAB and HSV are converted as Pillow does.
- Of several frames or pages the first is taken.
- A JPEG much larger than its user needs (`enough`) is decoded at 1/2, 1/4 or 1/8 of its size, by leaving out
  frequencies: its shorter side stays at least `enough`, and the pixels are a function of the file and `enough`.
- JPEGs of three channels or one are decoded by torchvision where it can, which is faster and gives Pillow's pixels,
  as both use libjpeg-turbo; what is wrong with a damaged one is for Pillow to say.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated, and to leave torchvision some day
    decode_jpeg = None

# Where Pillow itself refuses by default: half a gigabyte as uint8 RGB, and three times a 60-megapixel camera.
MAX_PIXELS = 178_956_970

# What files named as images hold in fact. Short on purpose: some of Pillow's other plugins run programs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


class ImageError(Exception):
    """A file's content cannot be used as an image. `path` says which file, `reason` why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{str(self.path)!r}: {self.reason}"


def decode(path: str | Path, max_pixels: int = MAX_PIXELS, enough: int | None = None) -> Tensor:
    """The image at `path` as uint8 [3, H, W], RGB, upright; the module says how each kind gets there.

    In memory the channels lie innermost, as Pillow has them: that saves a copy, and torchvision resizes this
    layout at twice the speed.

    Args:
        enough: a shorter side in pixels that will do, or None for all there are.

    Raises:
        ImageError: no image, a damaged one, or more than `max_pixels`, found before any is decoded.
        OSError: the file cannot be read; that is not the image's fault.
    """
    return decode_bytes(Path(path).read_bytes(), path, max_pixels, enough)


def decode_bytes(
    data: bytes, path: str | Path = "<bytes>", max_pixels: int = MAX_PIXELS, enough: int | None = None
) -> Tensor:
    """`decode` of a file's content; `path` is only for the message of an ImageError."""
    if not data:
        raise ImageError(path, "the file is empty")
    try:
        image = _open(io.BytesIO(data))
        if image is None:
            raise ImageError(path, f"no image that can be read ({', '.join(_plugins())})")
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                path, f"{width} x {height} pixels are more than the {max_pixels:,} allowed; make it smaller"
            )
        if enough is not None:
            image.draft(None, (enough, enough))  # a JPEG's size is then that which it will have
        if image.size == (width, height):
            pixels = _plain_jpeg(data, image)
            if pixels is not None:
                return _upright(pixels, image).permute(2, 0, 1)
        return to_tensor(image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins fail on damaged files with whatever their parsing ran into
        raise ImageError(path, f"damaged image: {error or type(error).__name__}") from error


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height that the header of an image file claims, as they lie on disk; raises as `decode` does."""
    with Path(path).open("rb") as file:
        try:
            image = _open(file)
        except Exception as error:
            raise ImageError(path, f"damaged image: {error or type(error).__name__}") from error
        if image is None:
            raise ImageError(path, f"no image that can be read ({', '.join(_plugins())})")
        return image.size


def to_tensor(image: Image.Image) -> Tensor:
    """An opened Pillow image as `decode` gives it; raises what Pillow does for damaged ones."""
    image.load()
    return _upright(torch.from_numpy(np.array(_rgb(image))), image).permute(2, 0, 1)


def _plain_jpeg(data: bytes, image: Image.Image) -> Tensor | None:
    """The pixels [H, W, 3] of a JPEG of which `image` is the header; None when it is for Pillow to decode."""
    if decode_jpeg is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except MemoryError:
        raise
    except Exception:  # damaged, or a torchvision without libjpeg
        return None
    pixels = pixels.permute(1, 2, 0)
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _open(file: IO[bytes]) -> Image.Image | None:
    """Read the header only; None when no format fits.

    Does what `Image.open` does but for its check of the size, which goes by a limit global to the process:
    whoever else set or cleared that limit must not decide what is refused here.
    """
    prefix = file.read(16)
    for name in _plugins():
        factory, accept = Image.OPEN[name]
        fits = accept is None or accept(prefix)
        if fits and not isinstance(fits, str):  # a string says why a plugin cannot work here
            file.seek(0)
            return factory(file, "")
    return None


@functools.cache
def _plugins() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _upright(pixels: Tensor, source: Image.Image) -> Tensor:
    """`pixels` [H, W, 3] turned as the EXIF data of their source say."""
    try:
        orientation = int(source.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata around an intact image
        return pixels
    if not 2 <= orientation <= 8:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 1)
    mirrored = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    return pixels.flip(mirrored).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    """Any loaded image in mode RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image)
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F to mode L."""
    values = np.asarray(image)
    if image.mode == "F":
        top = np.max(values, where=np.isfinite(values), initial=0)
        white = 1 if top <= 1 else 255 if top <= 255 else 65535
        grey = np.rint(np.nan_to_num(values, nan=0).clip(0, white) * (255 / white))
    else:
        grey = (values.clip(0, 65535).astype(np.uint32) + 128) // 257
        if "transparency" in image.info:  # the one value that stands for no ink
            grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))
