"""The table of formats in docs/input.md: for each row, which decoder is used and what comes out."""

from __future__ import annotations

import functools
import io
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distil_tl.data import decode as module
from distil_tl.data import fast_decoders, pillow
from distil_tl.data.decode import ImageError, decode_bytes, read_size
from distil_tl.data.pixels import REFERENCES
from tests.helpers.image_bytes import chunk, png, saved
from tests.helpers.paths import ROOT

TURNED = Path(__file__).with_name("turned.heic")


def table() -> dict[str, tuple[str, str]]:
    """By format the decoder of a plain installation, and with the extra."""
    text = (ROOT / "docs" / "input.md").read_text()
    body = re.search(r"^\| format \| plain .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert body
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body[1].splitlines()]
    return {name: (plain, extra) for name, plain, extra, _ in rows}


@functools.cache
def picture(width: int = 40, height: int = 24) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def rgba() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(picture().convert("L"))
    return image


def over_white(image: Image.Image) -> Tensor:
    background = Image.new("RGB", image.size, "white")
    background.paste(image, mask=image)
    return tensor(background)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animation(kind: str, **options: Any) -> bytes:
    return saved(picture(), kind, save_all=True, append_images=[picture().rotate(180)], duration=50, **options)


def sixteen(colour: int) -> tuple[bytes, np.ndarray]:
    """A PNG with 16 bits a channel, and its values."""
    values = np.random.default_rng(0).integers(0, 65536, (3, 4, 3 if colour == 2 else 1), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(4, 3, 16, colour, rows), values


def sixteen_bit_grey() -> list[tuple[bytes, Tensor]]:
    data, values = sixteen(0)
    return [(data, torch.from_numpy(np.rint(values / 257).astype(np.uint8)).permute(2, 0, 1).expand(3, -1, -1))]


def sixteen_bit_colour() -> list[tuple[bytes, Tensor]]:
    data, values = sixteen(2)
    return [(data, torch.from_numpy((values >> 8).astype(np.uint8)).permute(2, 0, 1))]


def pngs() -> list[tuple[bytes, Tensor]]:
    image, grey, indexed = picture(), picture().convert("L"), picture().quantize(16)
    interlaced = b"\0" + bytes([1, 2, 3]), struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    one = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", interlaced[1])
    return [
        (saved(image), tensor(image)),
        (saved(grey), tensor(grey)),
        (saved(indexed), tensor(indexed)),
        (saved(indexed, bits=4), tensor(indexed)),
        (saved(image.convert("1")), tensor(image.convert("1"))),
        (saved(rgba()), over_white(rgba())),
        (saved(image, exif=turned(6)), tensor(image.rotate(-90, expand=True))),
        (one + png(1, 1, 8, 2, interlaced[0])[33:], torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]),
    ]


def webps() -> list[tuple[bytes, Tensor]]:
    return [
        (saved(rgba(), "WEBP", lossless=True, exact=True), over_white(rgba())),
        (saved(picture(), "WEBP", lossless=True, exif=turned(3)), tensor(picture().rotate(180))),
        (animation("WEBP", lossless=True), tensor(picture())),
    ]


def others() -> list[tuple[bytes, Tensor]]:
    image = picture()
    return [(saved(image, kind), tensor(image)) for kind in ("BMP", "PPM", "TIFF", "JPEG2000")] + [
        (saved(image.convert("L"), "PPM"), tensor(image.convert("L"))),
        (saved(image, "TIFF", save_all=True, append_images=[image.rotate(180)]), tensor(image)),
        (saved(image, "TIFF", exif=turned(8)), tensor(image.rotate(90, expand=True))),
    ]


def jpegs(*modes: str) -> list[tuple[bytes, Tensor]]:
    """Within the loss of the format: test_decode_jpeg.py compares the decoders byte for byte."""
    found = []
    for mode in modes:
        image = picture().convert(mode)
        data = saved(image, "JPEG", quality=100, subsampling=0)
        found += [(data, tensor(Image.open(io.BytesIO(data)))), (data, tensor(image))]
        found.append((saved(image, "JPEG", quality=100, exif=turned(6)), tensor(image).rot90(-1, (1, 2))))
    return found


def avifs() -> list[tuple[bytes, Tensor]]:
    options = {"quality": 100, "subsampling": "4:4:4"}
    upright = tensor(picture())
    views = [upright, upright.flip(2), upright.flip(1, 2), upright.flip(1), upright.transpose(1, 2)]
    views += [upright.rot90(-1, (1, 2)), upright.transpose(1, 2).flip(1, 2), upright.rot90(1, (1, 2))]
    found = [(saved(picture(), "AVIF", exif=turned(n + 1), **options), view) for n, view in enumerate(views)]
    found.append((saved(rgba(), "AVIF", **options), over_white(rgba())))
    return [*found, (animation("AVIF", **options), upright)]


def heics() -> list[tuple[bytes, Tensor]]:
    """These files were made with an encoder, of the same picture as the JPEG; the second is stored rotated."""
    upright = tensor(Image.open(REFERENCES / "jpeg-444.jpg"))
    return [((REFERENCES / "heif-420.heic").read_bytes(), upright), (TURNED.read_bytes(), upright.rot90(-1, (1, 2)))]


def large_jpegs() -> list[tuple[bytes, Tensor]]:
    image = picture(640, 480)
    return [(saved(image, "JPEG", quality=95), tensor(image.reduce(factor))) for factor in (2, 4, 8)]


MAKERS: dict[str, tuple[Callable[[], list[tuple[bytes, Tensor]]], int]] = {  # files, largest mean difference
    "JPEG, grey or RGB": (lambda: jpegs("L", "RGB"), 6),
    "JPEG, CMYK or YCCK": (lambda: jpegs("CMYK"), 6),
    "JPEG, at least twice as large as needed": (large_jpegs, 3),
    "PNG, up to 8 bits a channel": (pngs, 0),
    "PNG, 16-bit grey": (sixteen_bit_grey, 0),
    "PNG, 16-bit colour": (sixteen_bit_colour, 0),
    "WebP, still, opaque, without EXIF data": (
        lambda: [(saved(picture(), "WEBP", lossless=True), tensor(picture()))],
        0,
    ),
    "WebP, other": (webps, 0),
    "GIF": (lambda: [(animation("GIF"), tensor(Image.open(io.BytesIO(animation("GIF")))))], 0),
    "BMP, PPM, PGM, TIFF, JPEG 2000": (others, 0),
    "AVIF": (avifs, 3),
    "HEIC": (heics, 12),
}


def test_every_row_of_the_table_is_tested() -> None:
    assert list(table()) == list(MAKERS)


@pytest.mark.parametrize("row", MAKERS)
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "decode"])
def test_the_row(row: str, extra: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, tolerance = MAKERS[row]
    decoder = table()[row][extra]
    if extra and (fast_decoders._torchcodec() is None or pillow.heif_plugin() is None):
        pytest.skip("distil_tl[decode] is not installed")
    if row == "AVIF" and "AVIF" not in pillow.plugins():
        pytest.skip("this Pillow has no AVIF")
    used: list[str] = []
    choose(monkeypatch, extra, used)
    for data, expected in make():
        used.clear()
        min_side = min(expected.shape[1:]) if "twice" in row else None
        if decoder == "refused":
            with pytest.raises(ImageError, match=r"HEIC, for which no decoder is installed: pip install 'distil_tl"):
                decode_bytes(data)
            continue
        image = decode_bytes(data, min_side=min_side)
        assert (image.dtype, image.shape) == (torch.uint8, expected.shape)
        assert (image.float() - expected.float()).abs().mean() <= tolerance
        assert [name.lower() for name in used or ["Pillow"]] == [decoder.lower()]


def choose(monkeypatch: pytest.MonkeyPatch, extra: bool, used: list[str]) -> None:
    """Decode as with or without the extra, and note in `used` what decoded a file instead of Pillow."""
    real = fast_decoders.fast_decoder.__wrapped__

    def noting(kind: str) -> fast_decoders.FastDecoder | None:
        decoder = real(kind)
        if decoder is None:
            return None

        def decode(data: bytes) -> Tensor:
            pixels = decoder.decode(data)
            used.append(decoder.name.partition(" ")[0])
            return pixels

        return fast_decoders.FastDecoder(decoder.name, decode)

    monkeypatch.setattr(module, "fast_decoder", noting)
    if not extra:
        known = tuple(name for name in pillow.plugins() if name != "HEIF")
        monkeypatch.setattr(fast_decoders, "_torchcodec", lambda: None)
        monkeypatch.setattr(pillow, "plugins", lambda: known)


def test_the_size_of_a_file_without_a_decoder_is_refused_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"JPEG", "PNG"} < set(pillow.plugins())
    monkeypatch.setattr(pillow, "plugins", lambda: ("JPEG", "PNG"))
    with pytest.raises(ImageError, match="HEIC, for which no decoder is installed"):
        read_size(TURNED)
    with pytest.raises(ImageError, match="AVIF, for which no decoder is installed"):
        read_size(REFERENCES / "avif-420.avif")
    (tmp_path / "video.jpg").write_bytes(b"\0\0\0\x18ftypisom")
    with pytest.raises(ImageError, match=r"not a readable image \(JPEG, PNG\)"):
        read_size(tmp_path / "video.jpg")


def test_a_heic_image_that_is_too_large_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    if pillow.heif_plugin() is None:
        pytest.skip("pi-heif is not installed")
    with pytest.raises(ImageError, match="61 x 83 pixels are more than the 5,000 allowed"):
        decode_bytes(TURNED.read_bytes(), max_pixels=5000)
