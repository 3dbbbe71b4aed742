"""The image decoder: every file becomes uint8 RGB by these rules.

- The EXIF orientation is applied. Colour profiles are ignored: values are taken as sRGB.
- Transparency of any kind is composited onto white.
- 16-bit grey, 32-bit integers (mode I, which Pillow also uses for 16-bit PGM) and floats (mode F) are scaled as
  `data.intensity` says. `dtype`: 16-bit grey is divided by 257 and rounded; 32-bit integers are taken as 16-bit values,
  clipped to 0..65535; floats have no defined range: white is the smallest of 1, 255 and 65535 that is not less than the
  largest value of the image, else 65535; values below 0 are black. `[low, high]`: low is black, high is white.
  `percentile`: the same, with the 0.5th and the 99.5th percentile of each image. NaN is black.
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

import io
from pathlib import Path

import PIL
import torch
from PIL import Image
from torch import Tensor

from distil_tl.data.fast_decoders import fast_decoder
from distil_tl.data.pillow import Intensity, heif_plugin, open_image, pixels_of, unknown_format, upright

# Pillow's own default limit: half a gigabyte as uint8 RGB; three times the size of a 60-megapixel photo.
MAX_PIXELS = 178_956_970
MAX_BYTES = 2**31  # of a file: more than that many pixels take uncompressed, 8 bytes each


class ImageError(Exception):
    """The content of a file cannot be used as an image. `path` is the file, `reason` says why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{str(self.path)!r}: {self.reason}"


def decode(
    path: str | Path, max_pixels: int = MAX_PIXELS, min_side: int | None = None, intensity: Intensity = "dtype"
) -> Tensor:
    """The image at `path` as uint8 [3, H, W], RGB, upright, by the rules of this module.

    The memory layout is channels-last, as in Pillow: this saves a copy, and torchvision resizes this layout twice as
    fast.

    Args:
        min_side: length in pixels that is sufficient for the shorter side; None: the full size is needed.
        intensity: as `data.intensity`.

    Raises:
        ImageError: the file is not an image or is damaged, or has more than `max_pixels`, which is checked before
            decoding.
        OSError: the file cannot be read; the image itself may be fine.
    """
    return decode_bytes(read_file(path), path, max_pixels, min_side, intensity)


def read_file(path: str | Path) -> bytes:
    """The content of an image file; raises as `decode` does if it is much too large, before it takes the memory."""
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise ImageError(path, f"{size / 1e9:,.1f} GB are too much for an image; is it another file?")
    return Path(path).read_bytes()


def decode_bytes(
    data: bytes,
    path: str | Path = "<bytes>",
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,
    intensity: Intensity = "dtype",
) -> Tensor:
    """`decode` of the content of a file; `path` is used only in the message of an ImageError."""
    if not data:
        raise ImageError(path, "the file is empty")
    try:
        image = open_image(io.BytesIO(data))
        if image is None:
            raise ImageError(path, unknown_format(data))
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
                return torch.from_numpy(upright(pixels.numpy(), image)).permute(2, 0, 1)
        return to_tensor(image, intensity)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type for damaged files
        raise ImageError(path, f"damaged image: {error or type(error).__name__}") from error


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height in the header of an image file, before the EXIF orientation; raises as `decode` does."""
    with Path(path).open("rb") as file:
        try:
            image = open_image(file)
        except Exception as error:
            raise ImageError(path, f"damaged image: {error or type(error).__name__}") from error
        if image is None:
            file.seek(0)
            raise ImageError(path, unknown_format(file.read(32)))
        return image.size


def to_tensor(image: Image.Image, intensity: Intensity = "dtype") -> Tensor:
    """An opened Pillow image as `decode` returns it; raises Pillow's errors for damaged images."""
    return torch.from_numpy(pixels_of(image, intensity)).permute(2, 0, 1)


def decoder_name(kind: str) -> str:
    """The decoder of a format, with its version."""
    fast = fast_decoder(kind) if kind in ("JPEG", "WEBP") else None
    if fast is not None:
        return fast.name
    plugin = heif_plugin() if kind == "HEIF" else None
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
