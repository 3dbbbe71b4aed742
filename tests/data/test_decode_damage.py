"""Decoding of images that are too large or damaged, and of files that are not images."""

from __future__ import annotations

import pickle
import random
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from distil_tl.data import pillow
from distil_tl.data.decode import MAX_BYTES, MAX_PIXELS, ImageError, decode, decode_bytes
from distil_tl.utils.errors import UserError
from tests.helpers.image_bytes import noise_image, png, saved


def bomb(side: int = 25000) -> bytes:
    """A small PNG with side x side pixels in its header, but only the first ones in its content."""
    return png(side, side, 8, 2, bytes(1000))


def test_a_decompression_bomb_is_refused_with_constant_memory(tmp_path: Path):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    decode_bytes(saved(Image.new("RGB", (1, 1))))  # plugins imported
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"bomb\.png': 25000 x 25000 pixels .*178,956,970"):
            decode(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_is_much_too_large_is_not_read(tmp_path: Path):
    with (tmp_path / "film.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 10**9)  # takes no space
    with pytest.raises(ImageError, match="3.1 GB are too much for an image"):
        decode(tmp_path / "film.jpg")


def test_no_pixel_memory_is_allocated_for_a_bomb(monkeypatch):
    # tracemalloc does not count the memory of Pillow's pixels.
    def fail(*_: object) -> None:
        raise AssertionError("decoding began")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    monkeypatch.setattr("PIL.Image.core.new", fail)
    with pytest.raises(ImageError, match="25000 x 25000"):
        decode_bytes(bomb())


@pytest.mark.parametrize("pillow_limit", [None, 1, 10**12])
@pytest.mark.filterwarnings("error")
def test_pillows_own_limit_has_no_effect(monkeypatch, pillow_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    assert decode_bytes(saved(Image.new("RGB", (20, 10)))).shape == (3, 10, 20)
    with pytest.raises(ImageError, match="25000 x 25000"):
        decode_bytes(bomb())
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_exact(monkeypatch):
    data = saved(Image.new("L", (20, 10)))
    assert decode_bytes(data, max_pixels=200).shape == (3, 10, 20)
    with pytest.raises(ImageError, match="more than the 199 allowed"):
        decode_bytes(data, max_pixels=199)
    assert MAX_PIXELS == 178_956_970


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(tmp_path: Path, kind, share):
    if kind not in pillow.plugins():
        pytest.skip("this Pillow lacks it")
    data = noise_image(kind)
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=f"cut.{kind}': ") as caught:
        decode(path)
    assert caught.value.path == path
    assert caught.value.reason
    assert str(caught.value) == f"{str(path)!r}: {caught.value.reason}"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text file", r"not a readable image \(JPEG, PNG"),
        (b"P", "."),
        (b"\xff\xd8\xff", "damaged image: ."),
        (b"\x89PNG\r\n\x1a\n", "damaged image: ."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
    ],
)
def test_files_that_are_not_images(tmp_path: Path, data, reason):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=rf"x\.jpg': {reason}"):
        decode(tmp_path / "x.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_noise_in_a_file_gives_an_image_or_an_image_error():
    dice = random.Random(0)
    outcomes = set()
    for kind in ("JPEG", "PNG", "BMP", "PPM", "TIFF", "GIF"):
        whole = noise_image(kind)
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(dice.choice([1, 3, 30])):
                data[dice.randrange(min(len(data), dice.choice([40, 400, 10**9])))] = dice.randrange(256)
            try:
                outcomes.add(decode_bytes(bytes(data), max_pixels=10**6).shape[0])
            except ImageError:
                outcomes.add(0)
    assert outcomes == {0, 3}


def test_a_file_that_cannot_be_read_is_not_a_bad_image(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone.jpg")


def test_out_of_memory_is_not_a_bad_image(monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode_bytes(noise_image("PNG"))


def test_the_error_can_be_passed_between_processes():
    error = pickle.loads(pickle.dumps(ImageError(Path("a/b.jpg"), "damaged image: why")))
    assert (error.path, error.reason, str(error)) == (
        Path("a/b.jpg"),
        "damaged image: why",
        "'a/b.jpg': damaged image: why",
    )
    assert not isinstance(error, UserError)
