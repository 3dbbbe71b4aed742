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


def test_preprocess_travels_through_json():
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), interpolation="bicubic", crop_size=299)
    assert Preprocess.from_json(json.loads(json.dumps(asdict(preprocess)))) == preprocess
    assert preprocess.mode == InterpolationMode.BICUBIC


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
