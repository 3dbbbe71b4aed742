"""Golden pixels: every kind of image that Pillow can create, against values computed by hand or by formula."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from distil_tl.data import pillow
from distil_tl.data.decode import decode, decode_bytes
from tests.helpers.image_bytes import chunk, png, saved


def pixels(tensor: Tensor) -> list[tuple[int, ...]]:
    """All pixels row by row as (R, G, B)."""
    assert tensor.dtype == torch.uint8
    assert tensor.ndim == 3
    return [tuple(p) for p in tensor.permute(1, 2, 0).reshape(-1, 3).tolist()]


def row(mode: str, *values: Any) -> Image.Image:
    """An image of one row."""
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def grey(*values: int) -> list[tuple[int, int, int]]:
    return [(v, v, v) for v in values]


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def test_rgb_keeps_its_pixels_and_shape(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(values)))
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        image = decode(path)
        assert image.shape == (3, 5, 7)
        assert image.dtype == torch.uint8
        assert image.permute(1, 2, 0).numpy().tolist() == values.tolist()


@pytest.mark.filterwarnings("error")
def test_the_pixels_may_be_changed():
    # Without this, torch warns only once per process about memory that is not writable.
    torch.set_warn_always(True)
    try:
        decode_bytes(saved(Image.new("RGB", (2, 2)))).add_(1)
    finally:
        torch.set_warn_always(False)


def test_jpeg_pixels_are_those_of_pillow():
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", quality=70)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert decode_bytes(data).permute(1, 2, 0).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "JPEG2000"])
def test_formats_without_loss(kind):
    if kind not in pillow.plugins():
        pytest.skip("this Pillow lacks it")
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    image = row("RGB", RED, GREEN, BLUE, (10, 20, 30))
    assert pixels(decode_bytes(saved(image, kind, **options))) == [RED, GREEN, BLUE, (10, 20, 30)]


def test_jpeg_kinds():
    for mode, colour in (("L", 77), ("RGB", (77, 77, 77)), ("CMYK", (0, 0, 0, 178))):
        image = decode_bytes(saved(Image.new(mode, (8, 8), colour), "JPEG", quality=100))
        assert image.shape == (3, 8, 8)
        assert (image.int() - 77).abs().max() <= 1, mode


def test_ycck_jpeg():
    # Pillow writes no YCCK. A flat CMYK JPEG becomes one by its Adobe marker: transform 2 instead of 0.
    data = saved(Image.new("CMYK", (8, 8), (55, 128, 128, 0)), "JPEG", quality=100)
    assert data.count(b"Adobe\0\x64\0\0\0\0\x00") == 1
    image = decode_bytes(data.replace(b"Adobe\0\x64\0\0\0\0\x00", b"Adobe\0\x64\0\0\0\0\x02"))
    # The file has inverted values: Y 200, Cb 127, Cr 127, K 255; as RGB (199, 201, 198), which Adobe takes as ink.
    assert (image[:, 0, 0].int() - torch.tensor([56, 54, 57])).abs().max() <= 1


def test_one_bit_and_grey():
    assert pixels(decode_bytes(saved(row("1", 0, 1)))) == grey(0, 255)
    assert pixels(decode_bytes(saved(row("L", 0, 1, 128, 255)))) == grey(0, 1, 128, 255)


SIXTEEN = (0, 128, 129, 256, 257, 32768, 65278, 65406, 65407, 65535)
EIGHT = (0, 0, 1, 1, 1, 128, 254, 254, 255, 255)  # divided by 257, rounded


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey(kind):
    assert tuple(round(v / 257) for v in SIXTEEN) == EIGHT
    assert pixels(decode_bytes(saved(row("I;16", *SIXTEEN), kind))) == grey(*EIGHT)


def test_sixteen_bit_grey_big_endian():
    values = np.array([SIXTEEN], dtype=">u2")
    image = Image.frombytes("I;16B", (len(SIXTEEN), 1), values.tobytes())
    assert pixels(decode_bytes(saved(image, "TIFF"))) == grey(*EIGHT)
    pgm = b"P5 10 1 65535\n" + values.tobytes()
    assert pixels(decode_bytes(pgm)) == grey(*EIGHT)


def test_sixteen_bit_grey_with_a_transparent_value():
    body = b"\0" + struct.pack(">HH", 1000, 2570)
    assert pixels(decode_bytes(png(2, 1, 16, 0, body, chunk(b"tRNS", struct.pack(">H", 1000))))) == grey(255, 10)


def test_sixteen_bit_colour_keeps_the_high_byte():
    body = b"\0" + struct.pack(">HHH", 65535, 0x12FF, 0)
    assert pixels(decode_bytes(png(1, 1, 16, 2, body))) == [(255, 0x12, 0)]


def test_thirty_two_bit_integers_count_as_sixteen():
    assert pixels(decode_bytes(saved(row("I", -5, 0, 257, 65535, 70000), "TIFF"))) == grey(0, 0, 1, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, 0.5, 1.0), (0, 128, 255)),
        ((0.0, 0.25, 0.3), (0, 64, 76)),
        ((0.0, 1.4, 254.6), (0, 1, 255)),
        ((-3.0, 256.0, 65535.0), (0, 1, 255)),
        ((-1e9, 32896.0, 1e9), (0, 128, 255)),
        ((float("nan"), 0.2, 1.0), (0, 51, 255)),
        ((float("-inf"), 0.2, float("inf")), (0, 51, 255)),
        ((float("nan"), -1.0), (0, 0)),
    ],
)
def test_floats(values, expected):
    assert pixels(decode_bytes(saved(row("F", *values), "TIFF"))) == grey(*expected)


def over_white(colour: tuple[int, ...], alpha: int) -> tuple[int, ...]:
    return tuple(round((c * alpha + 255 * (255 - alpha)) / 255) for c in colour)


ALPHAS = (0, 1, 64, 127, 128, 200, 254, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_composited_onto_white(kind):
    colour = (10, 100, 200)
    image = row("RGBA", *((*colour, a) for a in ALPHAS))
    assert pixels(decode_bytes(saved(image, kind))) == [over_white(colour, a) for a in ALPHAS]
    assert (over_white(colour, 0), over_white(colour, 255)) == (WHITE, colour)


def test_grey_with_alpha():
    image = row("LA", *((50, a) for a in ALPHAS))
    assert pixels(decode_bytes(saved(image))) == [over_white((50,), a) * 3 for a in ALPHAS]


def palette(*indices: int) -> Image.Image:
    image = row("P", *indices)
    image.putpalette([*RED, *GREEN, *BLUE])
    return image


def test_palette():
    assert pixels(decode_bytes(saved(palette(0, 1, 2, 1)))) == [RED, GREEN, BLUE, GREEN]


def test_palette_with_one_transparent_colour():
    for kind in ("PNG", "GIF"):
        assert pixels(decode_bytes(saved(palette(0, 1, 2), kind, transparency=1))) == [RED, WHITE, BLUE], kind


def test_palette_with_alpha_for_each_colour():
    data = saved(palette(0, 1, 2), transparency=bytes([255, 128, 0]))
    assert pixels(decode_bytes(data)) == [RED, over_white(GREEN, 128), WHITE]


def test_palette_with_an_alpha_band():
    image = Image.merge("LA", (row("L", 0, 1, 2), row("L", 255, 128, 0)))
    image = Image.frombytes("PA", image.size, image.tobytes())
    image.putpalette([*RED, *GREEN, *BLUE])
    assert pixels(decoded(image)) == [RED, over_white(GREEN, 128), WHITE]


def test_transparent_colour_of_grey_and_rgb():
    assert pixels(decode_bytes(saved(row("L", 9, 10), transparency=9))) == grey(255, 10)
    assert pixels(decode_bytes(saved(row("RGB", RED, BLUE), transparency=RED))) == [WHITE, BLUE]


def decoded(image: Image.Image) -> Tensor:
    """The conversion alone, for modes that no file format has."""
    return torch.from_numpy(np.array(pillow.to_rgb(image))).permute(2, 0, 1)


def test_cmyk():
    image = row("CMYK", (0, 0, 0, 0), (0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255))
    assert pixels(decode_bytes(saved(image, "TIFF"))) == [WHITE, RED, GREEN, BLACK]


def test_lab():
    colours = [(130, 90, 60), (60, 120, 150), WHITE]
    image = row("RGB", *colours)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(image, to_lab)
    assert lab is not None
    result = decode_bytes(saved(lab, "TIFF"))
    assert np.abs(np.subtract(pixels(result), colours)).max() <= 4  # LAB has 8 bits too


def test_hsv_and_ycbcr():
    assert pixels(decoded(row("HSV", (0, 255, 255), (0, 0, 128), (170, 255, 255)))) == [RED, *grey(128), BLUE]
    assert pixels(decoded(row("YCbCr", (0, 128, 128), (200, 128, 128)))) == grey(0, 200)


def test_one_pixel():
    image = decode_bytes(saved(Image.new("RGB", (1, 1), RED)))
    assert image.shape == (3, 1, 1)
    assert pixels(image) == [RED]


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_the_first_frame_of_an_animation_is_used(kind, options):
    if kind not in pillow.plugins():
        pytest.skip("this Pillow lacks it")
    frames = [Image.new("RGB", (3, 2), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert pixels(decode_bytes(data)) == [RED] * 6


def test_the_first_of_several_pages_is_used():
    data = saved(Image.new("RGB", (1, 1), RED), "TIFF", save_all=True, append_images=[Image.new("L", (2, 2))])
    assert pixels(decode_bytes(data)) == [RED]


# The picture is [[1, 2, 3], [4, 5, 6]]. How a camera stored it, for each way of holding the camera.
UPRIGHT = [[1, 2, 3], [4, 5, 6]]
STORED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[4, 1], [5, 2], [6, 3]],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(kind, orientation):
    if kind not in pillow.plugins():
        pytest.skip("this Pillow lacks it")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    stored = Image.fromarray(np.array(STORED[orientation], dtype=np.uint8) * 10).convert("RGB")
    image = decode_bytes(saved(stored, kind, exif=exif, **options))
    assert (image // 10)[1].tolist() == UPRIGHT
    assert image.shape == (3, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_exif_orientation_of_a_single_row_or_column(shape: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(10, 10 + shape[0] * shape[1], dtype=np.uint8).reshape(shape)
    content = saved(Image.fromarray(pixels).convert("RGB"), exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode_bytes(content).permute(1, 2, 0).numpy(), expected)


def test_exif_orientation_of_jpeg_and_other_modes():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("RGB", (20, 10), RED), "JPEG", exif=exif)
    assert decode_bytes(data).shape == (3, 20, 10)
    stored = np.array(STORED[6], dtype=np.uint16) * 2570
    assert (decode_bytes(saved(Image.fromarray(stored), exif=exif))[0] // 10).tolist() == UPRIGHT


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_matter(exif):
    assert decode_bytes(saved(Image.new("RGB", (20, 10), RED), "JPEG", exif=exif)).shape == (3, 10, 20)


def test_unknown_orientation_does_not_matter():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert decode_bytes(saved(Image.new("RGB", (2, 1)), exif=exif)).shape == (3, 1, 2)
