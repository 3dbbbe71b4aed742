"""The figure to expect: no image is judged by a head that it was trained on, or that it chose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distil_tl.data.feature_cache import FeatureCache, FeatureDataset
from distil_tl.data.sampler import TrainSampler
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.preemption import Agreement, Request
from distil_tl.distributed.process_group import DistInfo
from distil_tl.selection import estimate as module
from distil_tl.selection import heads
from distil_tl.selection.cells import Estimate
from distil_tl.selection.estimate import NoEstimateError, by_cross_validation
from distil_tl.training.config import OptimConfig, SearchConfig, StageConfig
from distil_tl.training.features import Features, FeaturesUnavailableError
from distil_tl.training.head_search import HeadSearch, search_heads
from distil_tl.training.heads.search import choose
from distil_tl.training.losses import training_loss
from distil_tl.training.stage import Stage
from distil_tl.utils.errors import UserError

CPU = torch.device("cpu")
IMAGES, WIDTH = 60, 80
INFO = DistInfo(Launch(), CPU, 60)


def dataset(folder: Path, targets: np.ndarray, *, separable: bool) -> FeatureDataset:
    """Random features, wide enough to learn any labels by heart; the last image can't be used."""
    features = torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(1))
    if separable:
        features[:, 0] += 8 * torch.from_numpy(targets)
    cache = FeatureCache(folder, IMAGES, 1)
    cache.write(0, 0, features, {IMAGES - 1: "broken"})
    return cache.open(targets)


def opened(features: FeatureDataset, monkeypatch: pytest.MonkeyPatch, batch: int = 4) -> Any:
    """What `CellSearch.open` returns, as far as it is needed."""
    search = SearchConfig(lr=[0.03, 0.001], weight_decay=[0.01])
    config = StageConfig(unfreeze="head", epochs=15, augment="none", search=search)
    stage = Stage("head", config, OptimConfig(), 32, "none", 0, "fp32", "none")
    targets = features.targets
    sampler = TrainSampler(
        IMAGES, global_batch_size=batch, world_size=1, rank=0, seed=0, stage="head", epochs=config.epochs
    )
    loss = training_loss(stage.optim, "none", np.bincount(targets), CPU)
    torch.manual_seed(0)
    whole = HeadSearch(stage, Features(features, features), nn.Sequential(), nn.Linear(WIDTH, 2), sampler, loss, CPU)
    monkeypatch.setattr(module, "prepare_search", lambda *args: whole)
    index = SimpleNamespace(targets=targets)
    source = SimpleNamespace(index=lambda split: index, config=SimpleNamespace(global_batch_size=batch))
    return SimpleNamespace(stage=stage, source=source, setup=SimpleNamespace(features=whole.features))


def estimated(found: Any, kind: str = "linear") -> Estimate:
    return by_cross_validation(INFO, found, Agreement(INFO, lambda: Request.CONTINUE), kind=kind)


def test_each_image_is_judged_once_by_a_head_that_has_not_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = np.arange(IMAGES) % 2
    calls: list[tuple[set[int], set[int], int]] = []

    def recorded(info: DistInfo, search: HeadSearch, agreement: Agreement) -> dict[str, Any]:
        train, val, sampler = search.features.train, search.features.val, search.sampler
        trained = set(train.__getitems__(list(sampler.keys(0)) + list(sampler.keys(1))).indices.tolist())
        judged = set(val.__getitems__([sampler.key(0, 0)._replace(image=i) for i in range(len(val))]).indices.tolist())
        calls.append((trained, judged, len(search.stage.config.search.lr)))
        return search_heads(info, search, agreement)

    monkeypatch.setattr(heads, "search_heads", recorded)
    found = estimated(opened(dataset(tmp_path / "a", targets, separable=True), monkeypatch))
    assert found.value > 0.8
    assert (found.split, found.n) == ("train", IMAGES - 1)
    inner, outer = calls[::2], calls[1::2]
    assert [grid for *_, grid in calls] == [2, 1] * 5
    assert sorted(image for _, judged, _ in outer for image in judged) == list(range(IMAGES))
    for (trained, chosen, _), (again, judged, _) in zip(inner, outer, strict=True):
        assert not trained & (chosen | judged)
        assert not (again | chosen) & judged


@pytest.mark.parametrize("kind", ["linear", "ridge", "knn"])
def test_labels_without_meaning_are_not_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A head that had seen the images would know them all by heart."""
    targets = np.random.default_rng(0).permutation(IMAGES) % 2
    found = estimated(opened(dataset(tmp_path / "b", targets, separable=False), monkeypatch), kind)
    assert found.n == IMAGES - 1
    assert found.value < 0.75


def test_each_fold_chooses_the_penalty_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, calls = np.arange(IMAGES) % 2, list[tuple[set[int], set[int], Any]]()

    def recorded(kind: str, problem: Any, val: Any, metric: str, settings: Any = None, **how: bool) -> Any:
        calls.append((set(problem.rows.dataset.images), set(val.dataset.images), settings))
        return choose(kind, problem, val, metric, settings, **how)

    monkeypatch.setattr(heads, "choose", recorded)
    found = opened(dataset(tmp_path / "d", targets, separable=True), monkeypatch, batch=40)
    assert estimated(found, "lda").value > 0.8, "and a batch larger than a fold does not matter"
    inner, outer = calls[::2], calls[1::2]
    assert sorted(image for _, judged, _ in outer for image in judged) == list(range(IMAGES))
    for (trained, chosen, path), (again, judged, settings) in zip(inner, outer, strict=True):
        assert path is None
        assert set(settings) == {"shrinkage", "scale"}
        assert not trained & (chosen | judged)
        assert not again & judged


def test_too_few_images_for_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(dataset(tmp_path / "c", np.arange(IMAGES) % 2, separable=True), monkeypatch, batch=40)
    with pytest.raises(NoEstimateError, match="36 images"):
        estimated(found)


@pytest.mark.parametrize("error", [UserError("too little memory"), FeaturesUnavailableError("no disk")])
def test_a_cross_validation_that_fails_gives_no_estimate(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(module, "by_cross_validation", fails)
    found: Any = SimpleNamespace(source=SimpleNamespace(splits={}))
    result: Any = SimpleNamespace(kind="knn")
    with pytest.raises(NoEstimateError, match=f"cross-validation gives none: {error}"):
        module.estimate(INFO, found, result, Agreement(INFO, lambda: Request.CONTINUE))
