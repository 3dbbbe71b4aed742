"""The image decoder: every file becomes uint8 RGB by these rules.

- The EXIF orientation is applied. Colour profiles are ignored: values are taken as sRGB.
- Transparency of any kind is composited onto white.
- 16-bit grey is divided by 257 and rounded. 32-bit integers (mode I, which Pillow also uses for 16-bit PGM) are
  taken as 16-bit values, clipped to 0..65535. Floats (mode F) have no defined range: white is the smallest of 1,
  255 and 65535 that is not less than the largest value of the image, else 65535; values below 0 and NaN are black.
- 16 bits per colour channel, palettes, 1-bit, CMYK, YCCK, YCbCr, LAB and HSV are converted as Pillow does.
- Of several frames or pages, the first is used.
- A JPEG much larger than needed (`min_side`) is decoded at 1/2, 1/4 or 1/8 of its size in the frequency domain: its
  shorter side stays at least `min_side`, and the pixels are a function of the file and `min_side`.
- JPEGs with one or three channels, and WebP images without transparency, EXIF data and animation, are decoded by
  TorchCodec if it is installed, such JPEGs else by torchvision. That is faster and gives the same pixels as Pillow, as
  all use libjpeg-turbo and libwebp. If it fails, Pillow decodes the file or reports the damage.
- HEIC is decoded by Pillow with the plugin pi-heif or pillow-heif. AVIF needs Pillow 11.3, or the plugin.

Pillow reads the header of every file first: the size, which is limited before anything is decoded, and the EXIF
orientation, which is applied here, once, whichever decoder is used.
"""

from __future__ import annotations

import functools
import importlib
import io
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image
from torch import Tensor

from distil_tl.data.fast_decoders import fast_decoder

# Pillow's own default limit: half a gigabyte as uint8 RGB; three times the size of a 60-megapixel photo.
MAX_PIXELS = 178_956_970

# The formats found in files with image extensions. Few on purpose: some other plugins of Pillow start programs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")

INSTALL = "pip install 'distil_tl[decode]'"  # what reads all formats


class ImageError(Exception):
    """The content of a file cannot be used as an image. `path` is the file, `reason` says why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{str(self.path)!r}: {self.reason}"


def decode(path: str | Path, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> Tensor:
    """The image at `path` as uint8 [3, H, W], RGB, upright, by the rules of this module.

    The memory layout is channels-last, as in Pillow: this saves a copy, and torchvision resizes this layout twice as
    fast.

    Args:
        min_side: length in pixels that is sufficient for the shorter side; None: the full size is needed.

    Raises:
        ImageError: the file is not an image or is damaged, or has more than `max_pixels`, which is checked before
            decoding.
        OSError: the file cannot be read; the image itself may be fine.
    """
    return decode_bytes(Path(path).read_bytes(), path, max_pixels, min_side)


def decode_bytes(
    data: bytes, path: str | Path = "<bytes>", max_pixels: int = MAX_PIXELS, min_side: int | None = None
) -> Tensor:
    """`decode` of the content of a file; `path` is used only in the message of an ImageError."""
    if not data:
        raise ImageError(path, "the file is empty")
    try:
        image = _open(io.BytesIO(data))
        if image is None:
            raise ImageError(path, _unknown_format(data))
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                path, f"{width} x {height} pixels are more than the {max_pixels:,} allowed; make it smaller"
            )
        if min_side is not None:
            # Sets `image.size` of a JPEG to the size that it will be decoded to.
            image.draft(None, (min_side, min_side))
        if image.size == (width, height):
            pixels = _decode_fast(data, image)
            if pixels is not None:
                return _upright(pixels, image).permute(2, 0, 1)
        return to_tensor(image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type for damaged files
        raise ImageError(path, f"damaged image: {error or type(error).__name__}") from error


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height in the header of an image file, before the EXIF orientation; raises as `decode` does."""
    with Path(path).open("rb") as file:
        try:
            image = _open(file)
        except Exception as error:
            raise ImageError(path, f"damaged image: {error or type(error).__name__}") from error
        if image is None:
            file.seek(0)
            raise ImageError(path, _unknown_format(file.read(32)))
        return image.size


def to_tensor(image: Image.Image) -> Tensor:
    """An opened Pillow image as `decode` returns it; raises Pillow's errors for damaged images."""
    image.load()
    return _upright(torch.from_numpy(np.array(_rgb(image))), image).permute(2, 0, 1)


def decoder_name(kind: str) -> str:
    """The decoder of a format, with its version."""
    fast = fast_decoder(kind) if kind in ("JPEG", "WEBP") else None
    if fast is not None:
        return fast.name
    plugin = _heif_plugin() if kind == "HEIF" else None
    return f"Pillow {PIL.__version__}" + (f" with {plugin}" if plugin else "")


def _decode_fast(data: bytes, image: Image.Image) -> Tensor | None:
    """The pixels [H, W, 3], as stored, of a file whose header is `image`; None if Pillow must decode it."""
    decoder = fast_decoder(str(image.format)) if _is_plain(image) else None
    if decoder is None:
        return None
    try:
        pixels = decoder.decode(data).permute(1, 2, 0)
    except MemoryError:
        raise
    except Exception:  # damaged, or a library without libjpeg
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _is_plain(image: Image.Image) -> bool:
    """Whether all decoders give the same pixels for a JPEG or WebP file."""
    if image.format == "JPEG":
        return image.mode in ("RGB", "L")
    still = image.format == "WEBP" and not getattr(image, "is_animated", False)
    return still and image.mode == "RGB" and "exif" not in image.info  # TorchCodec would apply the EXIF orientation


def _open(file: IO[bytes]) -> Image.Image | None:
    """The image with only its header read; None if it has no known format.

    Like `Image.open`, but without its check of the size: its limit is global to the process, so other code could
    change it.
    """
    prefix = file.read(16)
    for name in _plugins():
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if accepted and not isinstance(accepted, str):  # a string says why a plugin is not usable
            file.seek(0)
            return factory(file, "")
    return None


@functools.cache
def _plugins() -> tuple[str, ...]:
    Image.init()
    _heif_plugin()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def _heif_plugin() -> str | None:
    """Register a plugin of Pillow that reads HEIC. Returns its name with its version; None if there is none."""
    for module in ("pi_heif", "pillow_heif"):
        with suppress(ImportError):
            plugin = importlib.import_module(module)
            plugin.register_heif_opener()
            return f"{module} {plugin.__version__}"
    return None


def _unknown_format(data: bytes) -> str:
    """Why the content of a file is not an image that `_open` knows."""
    if data[4:8] == b"ftyp":
        for name, brands in (("AVIF", (b"avif", b"avis")), ("HEIC", (b"heic", b"heix", b"heim", b"heis", b"mif1"))):
            if any(brand in data[8:32] for brand in brands):
                return f"{name}, for which no decoder is installed: {INSTALL}"
    return f"not a readable image ({', '.join(_plugins())})"


def _upright(pixels: Tensor, source: Image.Image) -> Tensor:
    """`pixels` [H, W, 3] rotated and mirrored according to the EXIF data of `source`."""
    try:
        orientation = int(source.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata of an intact image
        return pixels
    if not 2 <= orientation <= 8:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 1)
    mirrored = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    return pixels.flip(mirrored).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode, in mode RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image)
        return background
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
        if "transparency" in image.info:  # the value that means transparent
            grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))
