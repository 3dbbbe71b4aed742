"""Resize of one image for a smaller copy of its folder. The new file appears only when it is complete."""

from __future__ import annotations

import io
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distil_tl.data.decode import ImageError, decode_bytes
from distil_tl.data.index import Index

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


@dataclass(frozen=True)
class Outcome:
    """The result for image `index`.

    Attributes:
        done: "resized", "copied" or, if the new file existed already, "there"; empty otherwise.
        fault: why it is not a usable image; nothing is written then.
        error: which file could not be read or written, and why.
    """

    index: int
    done: str = ""
    fault: str = ""
    error: str = ""


class ShrinkDataset(Dataset[Outcome]):
    """Item i writes image i of `index` below `out` unless it exists. The folders below `out` must exist.

    An image whose shorter side is longer than `resize` pixels is decoded by the rules of `decode`, resized to it and
    written without metadata. Any other image is copied byte for byte, as is an image too long for a JPEG. With `resize`
    None, no image is decoded. The images of a table that are not in folders of their classes are written into such.
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
            data = self.index.path(i).read_bytes()
            if self.resize is None:
                _write(self.out / name, data)
                return Outcome(i, "copied")
            image = decode_bytes(data, self.index.path(i), min_side=2 * self.resize)
            shorter, longer = sorted(image.shape[1:])
            if shorter <= self.resize or longer * self.resize > LONGEST * shorter:
                _write(self.out / name, data)
                return Outcome(i, "copied")
            _write(self.out / new_name, _encoded(smaller(image, self.resize), new_name, self.quality))
            return Outcome(i, "resized")
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
            _write(self.out / self.target(i), self.index.path(i).read_bytes())
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
    """An image uint8 [3, H, W] resized to a shorter side of `side` pixels, with antialiasing."""
    small: Tensor = F.resize(image, [side], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return small


def _encoded(image: Tensor, name: str, quality: int) -> bytes:
    pixels = image.permute(1, 2, 0).contiguous()
    red, green, blue = pixels.unbind(2)
    if torch.equal(red, green) and torch.equal(red, blue):
        pixels = red.contiguous()
    file = io.BytesIO()
    pillow_image = Image.fromarray(pixels.numpy())
    if name.lower().endswith(".png"):
        pillow_image.save(file, "PNG")
    else:
        pillow_image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    # Without fsync, which would take longer than all other work together.
    partial = path.with_name(f".shrink-{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(data)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
