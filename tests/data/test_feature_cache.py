"""Chunks of features are read as they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distil_tl.data import feature_cache
from distil_tl.data.feature_cache import FeatureCache
from distil_tl.data.sampler import SampleKey
from tests.helpers.recorded_features import ABOUT, TRAIN, VAL


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "CHUNK", 16)


def test_chunks_keep_no_file_open(tmp_path: Path, small_chunks: None) -> None:
    cache = FeatureCache(tmp_path / "f", 16 * 20, 2)
    for view, first in cache.chunks():
        cache.write(view, first, torch.full((16, 3), float(first + view)), {})
    before = len(list(Path("/proc/self/fd").iterdir()))
    features = cache.open(np.zeros(16 * 20, dtype=np.int64))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    batch = features.__getitems__([SampleKey(17, 0, 0), SampleKey(319, 1, 1)])
    assert batch.images.tolist() == [[16.0] * 3, [305.0] * 3]
    assert not any(array.flags.writeable for array in features.arrays)


@pytest.mark.parametrize("shape", [(16, 3, 2, 2), (1, 3, 5, 1)])  # the second is in Fortran order
def test_a_chunk_is_read_as_it_was_written(tmp_path: Path, small_chunks: None, shape: tuple[int, ...]) -> None:
    content = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    cache = FeatureCache(tmp_path / "f", shape[0], 1)
    cache.write(0, 0, content, {})
    assert np.array_equal(cache.open(np.zeros(shape[0])).arrays[0], content.numpy())


def test_chunks_written_by_earlier_code_are_valid_and_read() -> None:
    train, val = FeatureCache(TRAIN, 3, 2), FeatureCache(VAL, 2, 1)
    for cache in (train, val):
        assert all(cache.is_valid(*chunk) and cache.has_full_length(*chunk) for chunk in cache.chunks())
    features = train.open(np.array([0, 1, 1]))
    batch = features.__getitems__([SampleKey(0, 0, 0), SampleKey(0, 1, 1), SampleKey(2, 1, 2)])
    assert batch.images[:2, :3].tolist() == ABOUT["first_values"]["train"]
    assert batch.valid.tolist() == [True, True, False]
    assert [image for image, _ in batch.faults] == [2]
    assert val.open(np.array([0, 1])).arrays[0][0, :3].tolist() == ABOUT["first_values"]["val"][0]
