"""Scaling of 16-bit and float images to 8 bits, and the warning where 8 bits keep little of their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distil_tl.config import load
from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.decode import decode
from distil_tl.data.intensity import intensity_warning
from distil_tl.data.pillow import Intensity
from distil_tl.data.sampler import SampleKey
from distil_tl.data.source import ImageSource
from distil_tl.data.splits import open_splits
from distil_tl.models.preprocess import Preprocess
from distil_tl.utils.log import logger
from tests.helpers.image_bytes import png
from tests.helpers.staging import ALONE

NOISE = np.random.default_rng(0).integers(0, 4096, (40, 50))
NOISE[0, 4:6] = 0, 4095
HOUNSFIELD = (NOISE - 1024).astype(np.float32)


def saved(folder: Path, *arrays: np.ndarray) -> list[Path]:
    """Images of these values: 16-bit as PNG, others as TIFF."""
    paths = [folder / f"{i}.{'png' if array.dtype == np.uint16 else 'tif'}" for i, array in enumerate(arrays)]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return paths


def levels(path: Path, intensity: Intensity) -> tuple[int, int, int]:
    """The darkest and the brightest value of an image, and the number of different ones."""
    values = np.unique(decode(path, intensity=intensity).numpy())
    return int(values[0]), int(values[-1]), len(values)


@pytest.mark.parametrize("values", [NOISE.astype(np.uint16), NOISE.astype(np.int32), NOISE.astype(np.float32)])
def test_a_range_and_percentiles_keep_what_the_type_loses(values: np.ndarray, tmp_path: Path) -> None:
    (path,) = saved(tmp_path, values)
    assert levels(path, "dtype") == (0, 16, 17)
    assert levels(path, [0, 4095]) == (0, 255, 256)
    assert levels(path, "percentile") == (0, 255, 256)
    expected = np.rint(np.clip((values.astype(float) - 1000) / 2000, 0, 1) * 255).astype(np.uint8)
    assert np.array_equal(decode(path, intensity=[1000, 3000])[0].numpy(), expected)


def test_negative_values_and_what_is_not_a_number(tmp_path: Path) -> None:
    values = HOUNSFIELD.copy()
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    floats, integers = saved(tmp_path, values, HOUNSFIELD.astype(np.int32))
    for intensity in ([-1024, 3071], "percentile"):
        assert decode(floats, intensity=intensity)[0, 0, :3].tolist() == [0, 255, 0]
        assert levels(floats, intensity) == levels(integers, intensity) == (0, 255, 256)


@pytest.mark.parametrize(("bright", "expected"), [(0, (0, 0, 1)), (3, (0, 255, 2))])
def test_percentiles_of_an_image_of_nearly_one_value(
    bright: int, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    values = np.full((100, 100), 700, dtype=np.uint16)
    values[0, :bright] = 900
    assert levels(saved(tmp_path, values)[0], "percentile") == expected
    nothing = np.full((4, 4), np.nan, dtype=np.float32)
    assert levels(saved(tmp_path, nothing)[0], "percentile") == (0, 0, 1)


def test_images_of_eight_bits_are_not_scaled(tmp_path: Path) -> None:
    Image.fromarray((NOISE // 64).astype(np.uint8)).save(tmp_path / "a.png")
    assert levels(tmp_path / "a.png", [0, 10]) == levels(tmp_path / "a.png", "percentile") == (0, 63, 64)


TWELVE_BITS = NOISE.astype(np.uint16)
COLOURS = png(2, 1, 16, 2, b"\0" + b"\x0f\xff\x00\x10\x00\x20" * 2)


@pytest.mark.parametrize(
    ("arrays", "intensity", "words"),
    [
        ([TWELVE_BITS] * 3, "dtype", ["values from 0 to 4,095", "keeps 17 of 256", "data.intensity=[0,4095]"]),
        ([TWELVE_BITS // 100], [0, 65535], ["data.intensity=[0,65535] keeps 1 of 256", "data.intensity=[0,63]"]),
        ([HOUNSFIELD], "dtype", ["from -1,024 to 3,071", "values below 0 become black", "intensity=[-1024,3071]"]),
        ([HOUNSFIELD.astype(np.int32) * 20], "dtype", ["values below 0 become black"]),
        ([HOUNSFIELD], [-1024, 3071], None),
        ([TWELVE_BITS], "percentile", None),
        ([TWELVE_BITS * 16], "dtype", None),
        ([TWELVE_BITS * 16, TWELVE_BITS * 16, TWELVE_BITS * 0], "dtype", None),  # one is empty
        ([HOUNSFIELD * 0 + 0.5, np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)], "dtype", None),
        ([np.arange(64, dtype=np.uint8).reshape(8, 8)], "dtype", None),
        ([np.arange(64, dtype=np.uint8).reshape(8, 8)], [0, 4095], ["has no effect on the images looked at"]),
        ([], "dtype", None),
    ],
)
def test_what_loses_levels_is_said(
    arrays: list[np.ndarray], intensity: Intensity, words: list[str] | None, tmp_path: Path
) -> None:
    paths = saved(tmp_path, *arrays)
    warning = intensity_warning(len(paths), paths.__getitem__, intensity)
    assert (warning is None) == (words is None), warning
    assert all(word in (warning or "") for word in words or ()), warning


@pytest.mark.parametrize("given", ["[0,4095]", "[-1024.5,3071]", "percentile", "dtype"])
def test_what_the_key_may_be(given: str) -> None:
    assert config_of(given).problems() == []


@pytest.mark.parametrize("given", ["[4095,0]", "[0,0]", "[0]", "[0,.inf]", "[true,4]", "4095", "auto", "null", "[]"])
def test_what_it_may_not_be(given: str) -> None:
    assert any("data.intensity is" in problem and "[0,4095]" in problem for problem in config_of(given).problems())


def config_of(intensity: str) -> DataConfig:
    return load(["run_dir=x", f"data.intensity={intensity}"])[0].data


def test_training_and_evaluation_see_the_scaled_values_and_the_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    for folder in ("train/a", "train/b", "val/a"):
        (tmp_path / folder).mkdir(parents=True)
        saved(tmp_path / folder, np.repeat([[0, 4095]], 20, axis=1).repeat(50, axis=0).astype(np.uint16))
    for intensity, warned, brightest in (("dtype", True, 16), ([0, 4095], False, 255)):
        config = DataConfig(root=str(tmp_path), intensity=intensity, global_batch_size=2, workers=0)
        caplog.clear()
        splits = open_splits(ALONE, config)
        assert ("train: the 16-bit or float images have values from 0 to 4,095" in caplog.text) == warned
        source = ImageSource(ALONE, config, splits.as_dict(), Preprocess(), BadImages("error"))
        training = source.train_dataset("train", 40, "none", seed=0, stage="full")[SampleKey(0, 0, 0)]
        assert training.image is not None
        assert int(training.image.max()) == brightest
        (batch,) = source.eval_loader("val", 40, source.eval_batches("val"))
        assert int(batch.images.max()) == brightest


def test_sixteen_bits_a_colour_are_said_too_and_damage_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(COLOURS)
    (tmp_path / "b.png").write_bytes(b"no image")
    assert "at most 16 of 256 levels" in str(intensity_warning(1, [tmp_path / "a.png"].__getitem__, "dtype"))
    assert intensity_warning(1, [tmp_path / "b.png"].__getitem__, "dtype") is None
