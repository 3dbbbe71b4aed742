"""The accuracy to expect of the chosen cell, from images that played no part in the choice.

It was chosen by its figure on val, so that figure is too high. Images of test give a figure without this; where there
are none, those of train do, in a nested cross-validation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distil_tl.data.feature_cache import FeatureDataset, FeatureSubset
from distil_tl.data.sampler import TrainSampler, epoch_order
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.selection.cells import Estimate, Result, metric_interval
from distil_tl.selection.heads import HeadSearches
from distil_tl.selection.open_cell import OpenCell
from distil_tl.training.features import Features, FeaturesUnavailableError
from distil_tl.training.head_search import HeadSearch, prepare_search
from distil_tl.utils.errors import NonFiniteError, UserError

FOLDS = 5


class NoEstimateError(Exception):
    """There is no figure, on all ranks alike. The text is the reason."""


def estimate(info: DistInfo, found: OpenCell, result: Result, agreement: Agreement) -> Estimate:
    """The figure from test if there are such images, else from cross-validation. A collective.

    Raises:
        NoEstimateError: an image can't be used, memory does not suffice, train has too few images, or heads diverge.
        AllRanksStopError: on all ranks alike.
    """
    if "test" in found.source.splits:
        try:
            return on_test(info, found, result, agreement)
        except (UserError, NonFiniteError, FeaturesUnavailableError) as error:
            raise NoEstimateError(f"test gives none: {error}") from error
    try:
        return by_cross_validation(info, found, agreement, kind=result.kind)
    except NonFiniteError as error:
        raise NoEstimateError(f"the heads of a fold diverge: {error}") from error
    except (UserError, FeaturesUnavailableError) as error:
        raise NoEstimateError(f"the cross-validation gives none: {error}") from error


def on_test(info: DistInfo, found: OpenCell, result: Result, agreement: Agreement) -> Estimate:
    """The figure on test, of the head trained on train with the chosen settings. Raises on all ranks alike."""
    assert found.setup.features is not None
    test = _computed(info, found, agreement, "test")
    n = len(test) - len(test.bad())
    if n == 0:
        raise UserError("no image of test can be used; repair them, or remove the split")
    search = prepare_search(info, found.stage, found.setup, found.source)
    search = replace(search, features=Features(found.setup.features.train, test))
    scored = HeadSearches(info, search, agreement).result(result.kind, result.head)
    metric = found.stage.metric
    return Estimate("test", "images of test", n, metric, scored[metric], metric_interval(metric, scored, n))


def by_cross_validation(
    info: DistInfo, found: OpenCell, agreement: Agreement, folds: int = FOLDS, kind: str = "linear"
) -> Estimate:
    """The figure on train by nested cross-validation, for the whole way from a backbone to a head.

    Each fold is judged once, by a head trained on all other folds. Its settings were chosen by another fold, with heads
    trained on the rest.
    """
    stage, features = found.stage, found.setup.features
    assert features is not None
    plain = features.train if stage.config.views is None else _computed(info, found, agreement, "train")
    targets = found.source.index("train").targets
    fold = divide(targets, folds, stage.seed)
    smallest = min(int((~np.isin(fold, (k, (k + 1) % folds))).sum()) for k in range(folds))
    if kind == "linear" and smallest < found.source.config.global_batch_size:
        raise NoEstimateError(
            f"a cross-validation would train on {smallest} images, fewer than one global batch: set "
            f"data.global_batch_size to at most {smallest}"
        )
    whole = prepare_search(info, stage, found.setup, found.source)

    def part(search: HeadSearch, trained: np.ndarray, judged: np.ndarray) -> HeadSearch:
        rows = np.flatnonzero(trained)
        before = sampler = search.sampler
        if kind == "linear":
            sampler = TrainSampler(
                len(rows), global_batch_size=before.global_batch_size, world_size=1, rank=0, seed=stage.seed,
                stage=stage.name, epochs=before.epochs, targets=targets[rows] if before.is_balanced else None,
            )  # fmt: skip
        parts = Features(FeatureSubset(features.train, rows), FeatureSubset(plain, np.flatnonzero(judged)))
        return replace(search, sampler=sampler, features=parts)

    total, counted, spread = 0.0, 0, None
    for k in range(folds):
        inner = fold == (k + 1) % folds
        chosen = HeadSearches(info, part(whole, ~inner & (fold != k), inner), agreement).result(kind)
        outer = part(whole, fold != k, fold == k)
        n = len(outer.features.val) - len(outer.features.val.bad())
        judged = HeadSearches(info, outer, agreement).result(kind, chosen)
        total += judged[stage.metric] * n
        counted += n
        if "spread" in judged:
            spread = judged["spread"] if spread is None else spread + judged["spread"]
    method = f"images of train, by nested cross-validation in {folds} folds"
    # A mean over the classes is that of all folds together: in one fold a class has few images.
    value = total / max(1, counted) if spread is None else spread.value(stage.metric)
    interval = metric_interval(stage.metric, {stage.metric: value, "spread": spread}, counted)
    return Estimate("train", method, counted, stage.metric, value, interval)


def divide(targets: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each image, int64 [N]: of equal size, and with an equal share of each class, up to one image."""
    order = epoch_order(len(targets), seed, "folds", 0)
    by_class = order[np.argsort(targets[order], kind="stable")]
    fold = np.empty(len(targets), dtype=np.int64)
    fold[by_class] = np.arange(len(targets)) % folds
    return fold


def _computed(info: DistInfo, found: OpenCell, agreement: Agreement, split: str) -> FeatureDataset:
    """The features of a split without augmentation. Raises on all ranks alike."""
    extractor = found.extractor(info, agreement)
    extractor.fails_alike = True
    return found.read(extractor.open(split, "none", 1))
