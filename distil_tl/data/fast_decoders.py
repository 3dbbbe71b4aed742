"""Decoders that are faster than Pillow and give the same pixels: TorchCodec, and for JPEGs else torchvision.

TorchCodec has image decoders since version 0.16. torchvision's decoder is deprecated: when it is removed, this module
works without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TORCHCODEC = (0, 16)  # the first version that decodes images
START_OF_SCAN = 0xDA


@dataclass(frozen=True)
class FastDecoder:
    """A decoder of one format.

    Attributes:
        name: with its version.
        decode: the content of a file to uint8 [3, H, W], RGB, as stored: the EXIF orientation is not applied. It raises
            an exception of any type if it can't decode the file.
    """

    name: str
    decode: Callable[[bytes], Tensor]


@functools.cache
def fast_decoder(kind: str) -> FastDecoder | None:
    """The decoder of JPEG or WEBP files that is used first; None: Pillow decodes them."""
    codec = _torchcodec()
    if codec is None:
        return _torchvision() if kind == "JPEG" else None
    version, decoders = codec
    if kind == "JPEG":
        return FastDecoder(f"torchcodec {version}", lambda data: _decode_jpeg(decoders, data))
    # Files with EXIF data, by which TorchCodec would rotate the image, are not given to it.
    return FastDecoder(f"torchcodec {version}", lambda data: _decode_webp(decoders, data))


@functools.cache
def _torchcodec() -> tuple[str, Any] | None:
    """The version of TorchCodec and its module `decoders`; None if it can't be used."""
    try:
        version = importlib.metadata.version("torchcodec")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        if tuple(int(part) for part in version.split(".")[:2]) < TORCHCODEC:
            raise ImportError("it decodes images from version 0.16 on")
        decoders = importlib.import_module("torchcodec.decoders")
    except Exception as error:  # a library that can't be loaded raises errors of several types
        reason = str(error).strip().partition("\n")[0]
        logger.warning("torchcodec %s can't be used: %s. Images are decoded without it", version, reason)
        return None
    return version, decoders


def _decode_jpeg(decoders: Any, data: bytes) -> Tensor:
    pixels: Tensor = decoders.decode_jpeg(torch.frombuffer(without_app1(data), dtype=torch.uint8), mode="RGB")
    return pixels


def _decode_webp(decoders: Any, data: bytes) -> Tensor:
    pixels: Tensor = decoders.decode_webp(data, mode="RGB")
    return pixels


def _torchvision() -> FastDecoder | None:
    try:
        io: Any = importlib.import_module("torchvision.io")
        decode_jpeg, mode = io.decode_jpeg, io.ImageReadMode.RGB
    except (ImportError, AttributeError):  # removed
        return None
    # It warns at each call. Suppressing that at each call would be slow, and not safe with threads.
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)

    def decode(data: bytes) -> Tensor:
        pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
        return pixels

    return FastDecoder(f"torchvision {importlib.metadata.version('torchvision')}", decode)


def without_app1(data: bytes) -> bytearray:
    """A copy of a JPEG without its EXIF and XMP data: their segments, APP1, become APP15, which decoders skip.

    TorchCodec rotates an image by the EXIF data in its first APP1 segment, and that can't be switched off. Pillow also
    looks into other segments and into XMP data. So that all decoders give the same image, rotated once, `decode`
    applies the orientation that Pillow finds, and TorchCodec must find none.

    Raises:
        ValueError: the segments are damaged, or there is an APP1 segment after the start of the pixels.
    """
    copy, at, channels = bytearray(data), 2, 0
    try:
        while copy[at + 1] != START_OF_SCAN:
            if copy[at] != 0xFF or not 0xC0 <= copy[at + 1] <= 0xFE:
                raise ValueError("no segment where one must begin")
            if copy[at + 1] in (0xC0, 0xC1):  # not progressive
                channels = copy[at + 9]
            elif copy[at + 1] == 0xE1:
                copy[at + 1] = 0xEF
            at += 2 + int.from_bytes(copy[at + 2 : at + 4], "big")
        if copy[at + 4] == channels:  # the only scan: libjpeg reads no segments after it
            return copy
    except IndexError:
        raise ValueError("the pixels are missing") from None
    late = copy.find(b"\xff\xe1", at)
    end = copy.find(b"\xff\xd9", at) if late >= 0 else -1  # phones append other images and videos
    if late >= 0 and not 0 <= end < late:
        raise ValueError("an APP1 segment after the start of the pixels")
    return copy
