"""Resize of one image for a smaller copy of its folder. The new file appears only when it is complete."""

from __future__ import annotations

import io
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distil_tl.data.decode import ImageError, decode_bytes, read_file
from distil_tl.data.index import Index
from distil_tl.data.pillow import has_deep_colour, is_deep, open_image, upright

TEMPORARY = r"\.shrink-[0-9a-f]{16}\.tmp"  # left over if the process is killed
LONGEST = 65_500  # pixels, the maximal side of a JPEG
_JPEG = (
    ".jpg",
    ".jpeg",
    ".webp",
    ".avif",
    ".heic",
    ".heif",
)  # resized as JPEG; all others, as PNG


# What becomes of the values of images with more than 8 bits.
KEPT = "16-bit grey images: resized, as PNG of 16 bits"
UNTOUCHED = "images of floats or 32-bit integers: copied unchanged, as no other file keeps their values"
HALVED = "images of 16 bits per colour: resized to 8 bits, of which training uses no more"


@dataclass(frozen=True)
class Outcome:
    """The result for image `index`.

    Attributes:
        done: "resized", "copied" or, if the new file existed already, "there"; empty otherwise.
        fault: why it is not a usable image; nothing is written then.
        error: which file could not be read or written, and why.
        note: what became of its values, if they have more than 8 bits.
    """

    index: int
    done: str = ""
    fault: str = ""
    error: str = ""
    note: str = ""


class ShrinkDataset(Dataset[Outcome]):
    """Item i writes image i of `index` below `out` unless it exists. The folders below `out` must exist.

    An image whose shorter side is longer than `resize` pixels is decoded by the rules of `decode`, resized to it and
    written without metadata; 16-bit grey keeps its 16 bits. Any other image is copied byte for byte, as is an image too
    long for a JPEG, and one of floats or 32-bit integers. With `resize` None, no image is decoded. The images of a
    table that are not in folders of their classes are written into such.
    """

    def __init__(self, index: Index, out: Path, resize: int | None, quality: int) -> None:
        self.index = index
        self.folders = [] if has_class_folders(index) else [f"{name}/" for name in index.classes]
        self.out = out
        self.resize = resize
        self.quality = quality

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Outcome:
        name = self.target(i)
        new_name = self.folder(i) + resized_name(self.index.root, self.index.relative_path(i))
        try:
            if (self.out / name).exists() or (self.out / new_name).exists():
                return Outcome(i, "there")
            if self.resize is None:
                _write(self.out / name, self.index.path(i))
                return Outcome(i, "copied")
            data = read_file(self.index.path(i))
            image = decode_bytes(data, self.index.path(i), min_side=2 * self.resize)
            shorter, longer = sorted(image.shape[1:])
            if shorter <= self.resize or longer * self.resize > LONGEST * shorter:
                _write(self.out / name, data)
                return Outcome(i, "copied")
            note, values = deep_values(data)
            if note == UNTOUCHED or (note == KEPT and not new_name.lower().endswith(".png")):
                _write(self.out / name, data)
                return Outcome(i, "copied", note=UNTOUCHED)
            small = smaller(image if values is None else values, self.resize)
            _write(self.out / new_name, _encoded(small, new_name, self.quality))
            return Outcome(i, "resized", note=note)
        except ImageError as error:
            return Outcome(i, fault=error.reason)
        except OSError as error:
            return Outcome(i, error=f"{error.filename or self.index.path(i)}: {error.strerror or error}")

    def target(self, i: int) -> str:
        """Where image i is copied to, relative to `out`."""
        return self.folder(i) + self.index.relative_path(i)

    def folder(self, i: int) -> str:
        return self.folders[int(self.index.targets[i])] if self.folders else ""

    def copy(self, i: int) -> Outcome:
        """Copy the file of image i without decoding it."""
        try:
            _write(self.out / self.target(i), self.index.path(i))
        except OSError as error:
            return Outcome(i, error=f"{error.filename or self.index.path(i)}: {error.strerror or error}")
        return Outcome(i, "copied")


def has_class_folders(index: Index) -> bool:
    """Whether each image is in a folder that has the name of its class."""
    begins = [os.fsencode(f"{name}/") for name in index.classes]
    return all(p.startswith(begins[t]) for p, t in zip(index.relative_paths(), index.targets.tolist(), strict=True))


def resized_name(root: Path, name: str) -> str:
    """The name of the resized image of `name` below `root`.

    It is the same for JPEG and PNG; for another format an extension is added: a/x.bmp becomes a/x.bmp.png.
    """
    suffix = Path(name).suffix.lower()
    if suffix in (".jpg", ".jpeg", ".png"):
        return name
    ending = ".jpg" if suffix in _JPEG else ".png"
    while os.path.lexists(root / (name + ending)):  # the name of another image
        name += "_"
    return name + ending


def smaller(image: Tensor, side: int) -> Tensor:
    """An image uint8 [3, H, W], or float32 [1, H, W] of 16-bit values, resized to a shorter side of `side` pixels."""
    small: Tensor = F.resize(image, [side], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return small


def deep_values(data: bytes) -> tuple[str, Tensor | None]:
    """What becomes of an image with more than 8 bits, empty for others; and the values [1, H, W] of 16-bit grey."""
    image = open_image(io.BytesIO(data))
    if image is None or not is_deep(image):
        return (HALVED if image is not None and has_deep_colour(image) else ""), None
    image.load()
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        return UNTOUCHED, None
    values = values.astype(np.float32)
    if "transparency" in image.info:  # the value that means transparent, which is shown as white
        values[values == image.info["transparency"]] = 65535
    return KEPT, torch.from_numpy(upright(values[:, :, None], image)).permute(2, 0, 1)


def _encoded(image: Tensor, name: str, quality: int) -> bytes:
    if image.is_floating_point():
        return _png(image[0].round().clamp(0, 65535).numpy().astype(np.uint16))
    pixels = image.permute(1, 2, 0).contiguous()
    red, green, blue = pixels.unbind(2)
    if torch.equal(red, green) and torch.equal(red, blue):
        pixels = red.contiguous()
    if name.lower().endswith(".png"):
        return _png(pixels.numpy())
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _png(pixels: npt.NDArray[np.unsignedinteger]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _write(path: Path, data: bytes | Path) -> None:
    """Write `data`, or a copy of that file."""
    # Without fsync, which would take longer than all other work together.
    partial = path.with_name(f".shrink-{secrets.token_hex(8)}.tmp")
    try:
        if isinstance(data, Path):
            shutil.copyfile(data, partial)
        else:
            partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        source = isinstance(data, Path) and error.filename == str(data)
        raise OSError(error.errno, error.strerror, error.filename if source else str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
