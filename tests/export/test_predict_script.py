"""The script beside an exported model: the bytes that it makes of images, what it refuses, and which files it finds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distil_tl.cli import predictions
from distil_tl.data.decode import MAX_PIXELS, decode
from distil_tl.data.transforms import eval_transform
from distil_tl.data.walk import LEFTOVER_FOLDERS
from distil_tl.export import predict as script
from distil_tl.export.names import PREPROCESS
from distil_tl.export.onnx_model import OnnxModel
from distil_tl.export.predict import RefusedError, find_images, prepare, resize_and_crop
from distil_tl.export.to_onnx import describe
from distil_tl.models.preprocess import Preprocess
from tests.helpers.image_bytes import chunk, png, saved

KINDS = ("bilinear", "bicubic", "nearest")
MODES = ("center", "squash", "border")


def preprocess(size: int, side: int, interpolation: str, mode: str = "center") -> Preprocess:
    mean = (0.5, 0.25, 0.75)
    return Preprocess(mean, interpolation=interpolation, crop_size=size, resize_size=side, crop_mode=mode)


def settings(size: int, side: int, interpolation: str, mode: str = "center") -> dict[str, Any]:
    """As in the metadata of an exported model."""
    found: dict[str, Any] = json.loads(describe(preprocess(size, side, interpolation, mode), size, [], {})[PREPROCESS])
    return found


def by_package(path: Path, size: int, side: int, interpolation: str, mode: str = "center") -> Any:
    transform = eval_transform(preprocess(size, side, interpolation, mode), size)
    return transform(decode(path, min_side=transform.min_side)).numpy()


def random_pixels(height: int, width: int) -> Any:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(height: int, width: int) -> Image.Image:
    """A smooth image with noise, which JPEG keeps in part."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 90 * np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=2)
    return Image.fromarray((waves + random_pixels(height, width) % 30).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("interpolation", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_resized_images_are_those_of_torchvision_byte_for_byte(mode: str, interpolation: str) -> None:
    sizes = [(1, 1), (3, 50), (17, 23), (64, 64), (73, 90), (128, 73), (224, 300), (500, 333), (96, 640)]
    for height, width in sizes:
        pixels = random_pixels(height, width)
        for size, side in ((8, 9), (32, 37), (64, 64), (64, 128), (96, 110)):
            transform = eval_transform(preprocess(size, side, interpolation, mode), size)
            expected = transform(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
            found = resize_and_crop(pixels, settings(size, side, interpolation, mode))
            assert np.array_equal(found, expected), (height, width, size, side)


@pytest.mark.parametrize("interpolation", KINDS)
@pytest.mark.parametrize("colours", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_files_become_the_same_bytes_as_in_evaluation(
    kind: str, colours: str, interpolation: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    for height, width in ((37, 52), (420, 301), (150, 700)):  # JPEGs of the second size are decoded at a quarter
        path.write_bytes(saved(photo(height, width).convert(colours), kind))
        for mode in MODES:
            found = prepare(path, settings(32, 37, interpolation, mode))
            assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.uint8, (3, 32, 32), True)
            assert np.array_equal(found, by_package(path, 32, 37, interpolation, mode)), (height, width, mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_onnx_file_is_read_with_its_crop(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    trained, image = Preprocess(interpolation="bicubic").with_crop(mode, 0.9), torch.from_numpy(random_pixels(50, 70))
    metadata = describe(trained, 32, ["a", "b"], {}, intensity="dtype", extensions=[".png"])
    answer = np.full((1, 2), 0.5, dtype=np.float32)
    session = SimpleNamespace(
        get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=metadata), run=lambda names, images: [answer]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **settings: session)
    (tmp_path / "model.onnx").touch()
    found = eval_transform(OnnxModel(tmp_path / "model.onnx").preprocess, 32)(image.permute(2, 0, 1))
    assert torch.equal(found, eval_transform(trained, 32)(image.permute(2, 0, 1)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_orientation_is_applied(kind: str, tmp_path: Path) -> None:
    path, seen = tmp_path / "image", set[bytes]()
    for orientation in range(1, 10):  # 9 means nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        path.write_bytes(saved(photo(60, 90), kind, exif=exif))
        found = prepare(path, settings(24, 24, "bilinear"))
        assert np.array_equal(found, by_package(path, 24, 24, "bilinear")), orientation
        seen.add(found.tobytes())
    assert len(seen) == 8


def two_images() -> bytes:
    """A JPEG with a second image after it, as some cameras write."""
    file = io.BytesIO()
    photo(60, 50).save(file, "MPO", save_all=True, append_images=[photo(60, 50).rotate(90, expand=True)])
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(photo(60, 50), "JPEG", progressive=True),
        saved(photo(60, 50), "JPEG", subsampling=0, quality=30),
        two_images(),
        saved(photo(60, 50), "PNG", icc_profile=b"not a profile"),
    ],
    ids=["progressive", "without subsampling", "two images", "with a colour profile"],
)
def test_other_jpegs_and_pngs(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    assert np.array_equal(prepare(path, settings(24, 28, "bicubic")), by_package(path, 24, 28, "bicubic"))


GREY = Image.fromarray(np.full((9, 9), 7, dtype=np.uint8))
DEEP = png(2, 2, 16, 2, b"\0" + bytes(12) + b"\0" + bytes(12))
LATE = png(2, 2, 8, 0, b"\0\1\2\0\1\2").replace(chunk(b"IEND", b""), chunk(b"tRNS", b"\0\1") + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(GREY.convert("P")), "a PNG with mode P"),
        (saved(GREY.convert("RGBA")), "a PNG with mode RGBA"),
        (saved(GREY.convert("LA")), "a PNG with mode LA"),
        (saved(GREY.convert("1")), "a PNG with mode 1"),
        (saved(Image.fromarray(np.full((9, 9), 700, dtype=np.uint16))), "a PNG with mode I;16"),
        (DEEP, "a PNG with 16 bits per channel"),
        (saved(GREY, transparency=7), "a PNG with transparency"),
        (LATE, "a PNG with transparency"),
        (saved(photo(9, 9).convert("CMYK"), "JPEG"), "a JPEG with mode CMYK"),
        (saved(photo(9, 9), "WEBP"), "not a JPEG or PNG"),
        (saved(GREY, "GIF"), "not a JPEG or PNG"),
        (b"text", "not a JPEG or PNG"),
        (b"", "the file is empty"),
        (saved(photo(90, 90), "JPEG")[:900], "damaged image: image file is truncated"),
        (png(30_000, 30_000, 8, 0, b""), "30000 x 30000 pixels are more than the 178,956,970 allowed"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_other_images_are_refused_with_their_kind(
    data: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as the script does
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(RefusedError, match=reason):
        prepare(path, settings(8, 8, "bilinear"))


def test_the_script_has_the_limits_of_the_package() -> None:
    assert (script.LEFTOVERS, script.MAX_PIXELS) == (LEFTOVER_FOLDERS, MAX_PIXELS)


def test_the_same_files_are_found_in_the_same_order(tmp_path: Path) -> None:
    names = ["b/2.png", "b/1.JPG", "a/x.webp", "a-b/y.png", "a/notes.txt", "z.png", "a/b/c.tif"]
    names += ["._z.png", "__MACOSX/z.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "linked").symlink_to("b")
    paths = [tmp_path / "a/notes.txt", tmp_path, tmp_path / "z.png"]
    endings = (".jpg", ".png", ".webp", ".tif")
    (tmp_path / "runs/f/checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "sample.jpg"):
        (tmp_path / "runs/f" / name).write_bytes(b"x")
    assert find_images(paths, endings) == predictions.find_images(paths, endings)
    assert not [path for path in find_images(paths, endings) if path.name == "sample.jpg"]
    with pytest.raises(RefusedError, match="f is a run directory: give the images' folder"):
        find_images([tmp_path / "runs/f"], endings)
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    with pytest.raises(RefusedError, match="contains itself"):
        find_images(paths, endings)
    for nothing, message in ((tmp_path / "nowhere", "no file or folder"), (tmp_path / "a/b", "no image")):
        with pytest.raises(RefusedError, match=message):
            find_images([nothing], (".jpg",))
