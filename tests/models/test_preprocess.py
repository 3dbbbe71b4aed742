"""What the weights expect of their input, and its normalisation."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torchvision.transforms import InterpolationMode

from distil_tl.models.preprocess import Normalize, Preprocess

PREPROCESS = Preprocess()


@pytest.mark.parametrize(
    ("crop", "resize", "image_size", "expected"),
    [
        (224, 256, 224, 256),
        (224, 256, 112, 128),
        (224, 256, 64, 73),
        (224, 224, 96, 96),
        (224, 256, 1, 1),
        (256, 224, 100, 100),  # never smaller than the crop
        (384, 384, 8, 8),
    ],
)
def test_resize_keeps_the_weights_proportion(crop: int, resize: int, image_size: int, expected: int):
    assert Preprocess(crop_size=crop, resize_size=resize).resize_for(image_size) == expected


@pytest.mark.parametrize(
    ("mode", "share", "expected"),
    [
        ("weights", None, 73),
        ("weights", 0.5, 128),
        ("center", None, 64),
        ("squash", None, 64),
        ("border", 0.875, 73),
        ("center", 0.9, 71),  # timm rounds down
    ],
)
def test_a_given_share_or_another_mode_replaces_the_weights_proportion(mode: str, share: float | None, expected: int):
    assert Preprocess(crop_size=224, resize_size=256).with_crop(mode, share).resize_for(64) == expected


def test_preprocess_travels_through_json():
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), interpolation="bicubic", crop_size=299)
    for each in (preprocess, preprocess.with_crop("squash", None), preprocess.with_crop("border", 0.9)):
        assert Preprocess.from_json(json.loads(json.dumps(each.to_json()))) == each
        assert Preprocess.from_json(json.loads(json.dumps(asdict(each)))) == each
    assert preprocess.mode == InterpolationMode.BICUBIC


def test_state_and_cache_keys_of_the_weights_own_crop_are_those_of_earlier_code():
    """Which had neither field: its state.json is read, and its features are found."""
    earlier = {"mean": [0.5, 0.4, 0.3], "std": [1, 1, 1], "interpolation": "bicubic", "crop_size": 299,
               "resize_size": 342}  # fmt: skip
    read = Preprocess.from_json(earlier)
    assert read.crop_mode == "center"
    assert json.loads(json.dumps(read.with_crop("weights", None).to_json())) == earlier


def test_normalisation_is_the_textbooks():
    pixels = torch.randint(256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.stack([pixels, torch.zeros(3, 5, 7, dtype=torch.uint8), torch.full((3, 5, 7), 255).byte()])
    before = images.clone()
    normalize = Normalize(PREPROCESS)
    result = normalize(images)
    assert result.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(PREPROCESS.mean, PREPROCESS.std, strict=True)):
        expected = ((images[:, channel].double() / 255) - mean) / std
        torch.testing.assert_close(result[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(images, before)


def test_normalisation_is_not_among_the_weights():
    assert Normalize(PREPROCESS).state_dict() == {}
