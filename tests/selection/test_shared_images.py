"""Images that backbones have in common are decoded once, with the same pixels; others are not shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distil_tl.data import loader
from distil_tl.data.augmentation import Augment
from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.decode import decode
from distil_tl.data.sampler import SampleKey
from distil_tl.data.splits import Splits, open_splits
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.preprocess import Preprocess
from distil_tl.selection.shared_images import ImageMemory, SharedImages

INFO = DistInfo(Launch(), torch.device("cpu"), 60)
FIRST = Preprocess(crop_size=32, resize_size=36)
GREY = replace(FIRST, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def loaded(
    splits: Splits, config: DataConfig, memory: ImageMemory, preprocess: Preprocess, augment: Augment = "none"
) -> torch.Tensor:
    """All images of val, in two batches."""
    source = SharedImages(INFO, config, splits, preprocess, BadImages("skip"), memory)
    dataset = source.train_dataset("val", 32, augment, seed=0, stage="features")
    keys = [SampleKey(i, 0, i) for i in range(len(dataset))]
    batches = source.loader(dataset, [keys[:20], keys[20:]], 20)  # type: ignore[arg-type]
    return torch.cat([batch.images for batch in source.batches(batches, "val")])


def test_only_images_with_the_same_pixels_are_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(root=str(folder), workers=0)
    splits = open_splits(INFO, config)
    count, decoded = len(splits.val), list[object]()

    def counted(path: object, **how: Any) -> torch.Tensor:
        decoded.append(path)
        return decode(path, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "decode", counted)
    memory = ImageMemory(10**9)

    def times(preprocess: Preprocess, memory: ImageMemory, augment: Augment = "none") -> float:
        """How often the images are decoded. Their pixels are those without a memory."""
        decoded.clear()
        found = loaded(splits, config, memory, preprocess, augment)
        seen = len(decoded) / count
        assert torch.equal(found, loaded(splits, config, ImageMemory(0), preprocess, augment))
        return seen

    assert [times(each, memory) for each in (FIRST, GREY, FIRST)] == [1, 0, 0], "normalised later"
    others = (replace(GREY, crop_mode="squash"), replace(GREY, resize_size=40), replace(GREY, interpolation="bicubic"))
    assert [times(each, memory) for each in others] == [1, 1, 1]
    assert [times(replace(each, crop_mode="border"), memory) for each in (FIRST, GREY, GREY)] == [1, 1, 0]
    assert [times(FIRST, memory, "light") for _ in range(2)] == [1, 1]
    small = ImageMemory(count * 3 * 32**2)
    assert [times(FIRST, small) for _ in range(2)] == [1, 1], "not all of them fit"


def test_a_bad_image_is_found_again(data: Path) -> None:
    next((data / "val").rglob("*.png")).write_bytes(b"")
    config, memory = DataConfig(root=str(data), workers=0), ImageMemory(10**9)
    splits = open_splits(INFO, config)
    for preprocess in (FIRST, GREY):
        bad = BadImages("skip")
        source = SharedImages(INFO, config, splits, preprocess, bad, memory)
        dataset = source.train_dataset("val", 32, "none", seed=0, stage="features")
        keys = [SampleKey(i, 0, i) for i in range(len(dataset))]
        found = list(source.batches(source.loader(dataset, [keys], len(keys)), "val"))  # type: ignore[arg-type]
        assert len(bad.by_split["val"]) == 1
        assert int(found[0].valid.sum()) == len(keys) - 1
