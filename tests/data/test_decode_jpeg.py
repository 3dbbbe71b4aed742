"""Decoding of JPEGs: two decoders with the same results, and decoding at a reduced size."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distil_tl.data import decode as module
from distil_tl.data.decode import ImageError, decode_bytes
from tests.helpers.image_bytes import noise_image, saved


def test_the_same_every_time():
    data = noise_image("JPEG")
    assert torch.equal(decode_bytes(data), decode_bytes(data))


def photo(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG with coarse and fine structure."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return saved(Image.fromarray(coarse).resize((width, height)).convert(mode), "JPEG", **options)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}, {"restart_marker_rows": 1}],
)
def test_either_decoder_of_jpegs_gives_the_same(monkeypatch, mode, options):
    data = photo(61, 47, mode, **options)
    fast = decode_bytes(data)
    monkeypatch.setattr(module, "decode_jpeg", None)
    assert torch.equal(decode_bytes(data), fast)


def test_the_fast_decoder_does_not_decide_what_is_damaged(monkeypatch):
    dice = random.Random(0)
    whole = photo(61, 47)
    damaged = [whole[:n] for n in range(300, len(whole), 97)]
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[dice.randrange(len(data))] = dice.randrange(256)
        damaged.append(bytes(data))

    def outcomes() -> list[Any]:
        found: list[Any] = []
        for data in damaged:
            try:
                found.append(decode_bytes(data, max_pixels=10**6).tolist())
            except ImageError as error:
                found.append(error.reason)
        return found

    fast = outcomes()
    monkeypatch.setattr(module, "decode_jpeg", None)
    assert outcomes() == fast
    assert {type(outcome) for outcome in fast} == {str, list}


@pytest.mark.filterwarnings("error")
def test_pillow_is_used_if_the_fast_decoder_fails(monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no libjpeg")

    data = photo(61, 47)
    expected = decode_bytes(data)
    monkeypatch.setattr(module, "decode_jpeg", fail)
    assert torch.equal(decode_bytes(data), expected)


@pytest.mark.parametrize(
    ("enough", "shape"),
    [(None, (300, 402)), (301, (300, 402)), (151, (300, 402)), (150, (150, 201)), (76, (150, 201)), (75, (75, 101)),
     (37, (38, 51)), (1, (38, 51))],
)  # fmt: skip
def test_a_jpeg_is_decoded_no_smaller_than_enough(enough, shape):
    image = decode_bytes(photo(402, 300), min_side=enough)
    assert image.shape == (3, *shape)
    assert image.stride()[0] == 1


def test_a_jpeg_decoded_small_shows_the_same_picture():
    # Gradients, which look the same after any correct way of making them smaller.
    y, x = np.mgrid[:320, :400]
    data = saved(Image.fromarray(np.stack([x / 2, y / 2, (x + y) / 4], 2).astype(np.uint8)), "JPEG", quality=95)
    whole = decode_bytes(data)
    small = decode_bytes(data, min_side=80)
    assert small.shape == (3, 80, 100)
    means = whole.float().reshape(3, 80, 4, 100, 4).mean(dim=(2, 4))
    assert (small.float() - means).abs().max() <= 3
    assert torch.equal(decode_bytes(data, min_side=80), small)


def test_a_jpeg_decoded_small_is_upright_and_converted_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_bytes(photo(400, 200, exif=exif), min_side=50).shape == (3, 100, 50)
    for mode in ("L", "CMYK"):
        whole, small = (decode_bytes(photo(400, 320, mode), min_side=n).float() for n in (None, 160))
        assert small.shape == (3, 160, 200)
        assert (small - whole.reshape(3, 160, 2, 200, 2).mean(dim=(2, 4))).abs().mean() < 3, mode


def test_only_jpegs_are_decoded_small():
    for kind in ("PNG", "TIFF", "BMP"):
        assert decode_bytes(saved(Image.new("RGB", (80, 80)), kind), min_side=10).shape == (3, 80, 80)


def test_limits_and_damage_are_those_of_the_whole_jpeg():
    data = photo(402, 300)
    with pytest.raises(ImageError, match="402 x 300 pixels"):
        decode_bytes(data, max_pixels=402 * 300 - 1, min_side=10)
    for share in (0.3, 0.9):
        with pytest.raises(ImageError, match="damaged image"):
            decode_bytes(data[: int(len(data) * share)], min_side=10)
