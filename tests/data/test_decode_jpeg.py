"""Decoding of JPEG and WebP: all decoders give the same, and decoding of JPEGs at a reduced size."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import random
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import Tensor

from distil_tl.data import decode as module
from distil_tl.data import fast_decoders
from distil_tl.data.decode import ImageError, decode_bytes
from distil_tl.data.fast_decoders import FastDecoder
from distil_tl.utils.log import setup_console
from tests.helpers.image_bytes import noise_image, saved


def test_the_same_every_time():
    data = noise_image("JPEG")
    assert torch.equal(decode_bytes(data), decode_bytes(data))


def photo(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG with coarse and fine structure."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return saved(Image.fromarray(coarse).resize((width, height)).convert(mode), "JPEG", **options)


@pytest.fixture(params=["torchcodec", "torchvision"])
def used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets one of the fast decoders be the first choice; the list has a word for each file that it decoded."""
    if request.param == "torchvision":
        monkeypatch.setattr(fast_decoders, "_torchcodec", lambda: None)
    elif fast_decoders._torchcodec() is None:
        pytest.skip("torchcodec is not installed")
    files: list[str] = []

    def counting(kind: str) -> FastDecoder | None:
        decoder = fast_decoders.fast_decoder.__wrapped__(kind)
        if decoder is None:
            return None

        def decode(data: bytes) -> Tensor:
            pixels = decoder.decode(data)
            files.append(kind)
            return pixels

        return FastDecoder(decoder.name, decode)

    monkeypatch.setattr(module, "fast_decoder", counting)
    return files


def by_pillow(monkeypatch: pytest.MonkeyPatch, data: bytes, **how: Any) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(module, "fast_decoder", lambda _: None)
        return decode_bytes(data, **how)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
        {"quality": 5},
        {"icc_profile": b"x" * 70_000, "comment": b"a comment"},
    ],
)
def test_all_decoders_of_jpegs_give_the_same(monkeypatch, used, mode, options):
    for width, height in ((61, 47), (1, 1), (16, 9)):
        data = photo(width, height, mode, **options)
        fast = decode_bytes(data)
        assert torch.equal(by_pillow(monkeypatch, data), fast)
        assert fast.stride()[0] == 1, "channels last"
    assert len(used) == 3


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True}, {"quality": 5, "icc_profile": b"x" * 1000}])
def test_all_decoders_of_webp_give_the_same(monkeypatch, used, options):
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "exif": {"exif": turned(6)}, "animated": {"save_all": True}}
    for kind, more in kinds.items():
        image = Image.open(io.BytesIO(photo(61, 47)))
        frames = [image.rotate(90)] if kind == "animated" else []
        data = saved(image, "WEBP", **options, **more, **({"append_images": frames} if frames else {}))
        fast = decode_bytes(data)
        assert torch.equal(by_pillow(monkeypatch, data), fast), kind
        assert fast.stride()[0] == 1, "channels last"
    alpha = saved(Image.new("RGBA", (9, 9), (9, 99, 199, 100)), "WEBP", **options)
    assert torch.equal(by_pillow(monkeypatch, alpha), decode_bytes(alpha))
    assert used == (["WEBP"] if "torchcodec" in module.decoder_name("JPEG") else []), "only the plain one"


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def app1(data: bytes, *contents: bytes) -> bytes:
    """A JPEG with these APP1 segments at its beginning."""
    segments = [b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content for content in contents]
    return data[:2] + b"".join(segments) + data[2:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_jpeg_is_applied_once(monkeypatch, used, orientation):
    plain = photo(40, 24)
    exif = b"Exif\0\0" + turned(orientation).tobytes().removeprefix(b"Exif\0\0")
    for data in (app1(plain, exif), app1(plain, XMP, exif), app1(plain, exif, XMP)):
        image = decode_bytes(data)
        assert torch.equal(image, by_pillow(monkeypatch, data))
        assert image.shape == ((3, 24, 40) if orientation < 5 else (3, 40, 24))
        assert torch.equal(image, decode_bytes(plain)) == (orientation == 1)
    assert len(used) == 6


def test_the_orientation_in_xmp_data_is_applied_once(monkeypatch, used):
    plain = photo(40, 24)
    data = app1(plain, XMP)
    assert torch.equal(decode_bytes(data), decode_bytes(plain).flip(1, 2))
    assert len(used) == 2


def test_an_orientation_between_two_scans_is_not_applied(monkeypatch, used):
    """Pillow reads no segment after the first scan; TorchCodec would apply this one, so it must not decode the file."""
    plain = photo(40, 24, progressive=True)
    at = plain.index(b"\xff\xc4", plain.index(b"\xff\xda"))
    data = plain[:at] + app1(b"", b"Exif\0\0" + turned(3).tobytes().removeprefix(b"Exif\0\0")) + plain[at:]
    assert torch.equal(decode_bytes(data), decode_bytes(plain))
    assert torch.equal(by_pillow(monkeypatch, data), by_pillow(monkeypatch, plain))
    assert len(used) == (1 if "torchcodec" in module.decoder_name("JPEG") else 2)


def test_an_orientation_that_the_decoder_sees_would_be_applied_twice(monkeypatch, used):
    monkeypatch.setattr(fast_decoders, "without_app1", bytearray)
    data = photo(40, 24, exif=turned(3))
    twice = "torchcodec" in module.decoder_name("JPEG")
    assert torch.equal(decode_bytes(data), by_pillow(monkeypatch, data)) == (not twice)


def test_segments_and_pixels_stay_when_app1_is_hidden():
    plain = photo(61, 47, progressive=True)
    data = app1(plain, b"Exif\0\0", XMP)
    hidden = fast_decoders.without_app1(data)
    assert [i for i in range(len(data)) if hidden[i] != data[i]] == [3, 3 + 4 + 6]
    assert hidden.count(b"\xff\xef") == 2
    assert fast_decoders.without_app1(plain) == plain
    video = data + app1(plain, XMP)  # after the end of the image, as phones append it
    assert fast_decoders.without_app1(video)[len(data) :] == video[len(data) :]
    single = photo(61, 47)  # in one scan, after which no decoder looks for segments
    assert fast_decoders.without_app1(single[:-2] + b"\xff\xe1" + single[-2:])[2:4] == single[2:4]
    for damaged in (plain[:50], b"", plain[:2] + b"junk" + plain[2:], plain[:-2] + b"\xff\xe1" + plain[-2:]):
        with pytest.raises(ValueError, match="segment|missing"):
            fast_decoders.without_app1(damaged)


def test_the_fast_decoder_does_not_decide_what_is_damaged(monkeypatch, used):
    dice = random.Random(0)
    damaged = []
    for whole in (photo(61, 47), photo(61, 47, progressive=True, exif=turned(3))):
        damaged += [whole[:n] for n in range(300, len(whole), 97)]
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(3):
                data[dice.randrange(len(data))] = dice.randrange(256)
            damaged.append(bytes(data))

    def outcomes(decode: Any) -> list[Any]:
        found: list[Any] = []
        for data in damaged:
            try:
                found.append(decode(data).tolist())
            except ImageError as error:
                found.append(error.reason)
        return found

    fast = outcomes(lambda data: decode_bytes(data, max_pixels=10**6))
    assert outcomes(lambda data: by_pillow(monkeypatch, data, max_pixels=10**6)) == fast
    assert {type(outcome) for outcome in fast} == {str, list}
    assert used


@pytest.mark.filterwarnings("error")
def test_pillow_is_used_if_the_fast_decoder_fails(monkeypatch):
    def fail(_: bytes) -> Tensor:
        raise RuntimeError("no libjpeg")

    data = photo(61, 47)
    expected = by_pillow(monkeypatch, data)
    monkeypatch.setattr(module, "fast_decoder", lambda _: FastDecoder("broken", fail))
    assert torch.equal(decode_bytes(data), expected)


def test_too_large_jpegs_are_refused_by_their_header(used):
    data = bytearray(photo(16, 16))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 30_000, 30_000)
    with pytest.raises(ImageError, match="30000 x 30000 pixels"):
        decode_bytes(bytes(data))
    assert not used


def test_threads_decode_side_by_side(used):
    files = [photo(61 + n, 47) for n in range(8)]
    expected = [decode_bytes(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode_bytes, files * 5))
    assert all(torch.equal(image, expected[i % 8]) for i, image in enumerate(found))


# Which decoder is used.


@pytest.fixture
def undecided() -> Iterator[None]:
    caches = (fast_decoders.fast_decoder, fast_decoders._torchcodec)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def install_fake(monkeypatch: pytest.MonkeyPatch, version: str, result: Any) -> None:
    """A torchcodec of this version whose module `decoders` is `result`, or which fails to import with it."""
    real_version, real_import = importlib.metadata.version, importlib.import_module

    def import_module(name: str) -> Any:
        if name != "torchcodec.decoders":
            return real_import(name)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "torchcodec" else real_version(name)
    )
    monkeypatch.setattr(importlib, "import_module", import_module)


def test_torchcodec_is_the_first_choice_for_jpeg_and_webp(monkeypatch, undecided):
    called: list[tuple[str, str]] = []

    def decode(name: str) -> Any:
        def fake(source: Any, *, mode: str) -> Tensor:
            called.append((name, mode))
            return torch.zeros(8, 8, 3, dtype=torch.uint8).permute(2, 0, 1)

        return fake

    install_fake(monkeypatch, "0.16.0", SimpleNamespace(decode_jpeg=decode("jpeg"), decode_webp=decode("webp")))
    for kind in ("JPEG", "WEBP", "PNG"):
        assert (int(decode_bytes(saved(Image.new("RGB", (8, 8), "white"), kind)).max()) == 0) == (kind != "PNG")
    assert called == [("jpeg", "RGB"), ("webp", "RGB")]
    assert [module.decoder_name(kind) for kind in ("JPEG", "WEBP")] == ["torchcodec 0.16.0"] * 2
    assert module.decoder_name("PNG") == f"Pillow {PIL.__version__}"


@pytest.mark.parametrize(
    ("version", "result", "reason"),
    [
        ("0.10.0", None, "torchcodec 0.10.0 can't be used: it decodes images from version 0.16 on"),
        (
            "0.17.0+cu130",
            OSError("libcudart.so.13: cannot open\n  more"),
            "0.17.0+cu130 can't be used: libcudart.so.13",
        ),
    ],
)
def test_a_torchcodec_that_does_not_work_is_named_and_not_used(monkeypatch, undecided, capsys, version, result, reason):
    install_fake(monkeypatch, version, result)
    setup_console(True)
    decode_bytes(photo(61, 47))
    decode_bytes(photo(61, 47))
    output = capsys.readouterr()
    assert (output.out + output.err).count(reason) == 1
    assert "torchcodec" not in module.decoder_name("JPEG")


def test_without_torchcodec_and_torchvisions_decoder_pillow_is_used(monkeypatch, undecided):
    data = photo(61, 47)
    expected = by_pillow(monkeypatch, data)
    real = importlib.import_module
    monkeypatch.setattr(fast_decoders, "_torchcodec", lambda: None)
    for removed in (SimpleNamespace(), ImportError("no module named torchvision.io")):

        def import_module(name: str, found: Any = removed) -> Any:
            if name != "torchvision.io":
                return real(name)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(importlib, "import_module", import_module)
        fast_decoders.fast_decoder.cache_clear()
        assert torch.equal(decode_bytes(data), expected)
        assert module.decoder_name("JPEG") == f"Pillow {PIL.__version__}"


def test_torchvisions_warning_is_not_shown():
    decoder = fast_decoders._torchvision()
    if decoder is None:
        pytest.skip("this torchvision decodes no JPEGs")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        again = fast_decoders._torchvision()
        assert again is not None
        again.decode(photo(61, 47))
    assert not shown


# Decoding at a reduced size.


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
