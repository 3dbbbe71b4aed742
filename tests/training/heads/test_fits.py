"""Fitted heads: the same as scikit-learn's or as their formulas, on any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_tl.data.feature_cache import FeatureCache, FeatureDataset
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import Launch, read_launch
from distil_tl.distributed.preemption import Agreement, Request
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.models.fitted_heads import CosineHead, MlpHead
from distil_tl.training.heads import rows as rows_module
from distil_tl.training.heads.closed_form import _solve, fit_lda, fit_prototypes, fit_ridge
from distil_tl.training.heads.comparison import TEMPERATURE, UNIFORM, fit_cosine, fit_knn, fit_mlp
from distil_tl.training.heads.config import FITTED_HEADS
from distil_tl.training.heads.fitted import SCALES
from distil_tl.training.heads.logistic import fit_logistic, path_of, path_to
from distil_tl.training.heads.problem import Problem, open_problem
from distil_tl.training.heads.rows import Group, Part, Rows
from distil_tl.training.heads.search import choose, fit
from distil_tl.utils.errors import NonFiniteError, UserError
from tests.helpers.ranks import run_ranks

CLASSES = 3
COMPARED_HEADS = ("knn",)


def group(info: DistInfo | None = None) -> Group:
    info = info or DistInfo(Launch(), torch.device("cpu"), 60)
    return Group(info, Agreement(info, lambda: Request.CONTINUE))


def images(count: int, width: int, seed: int = 1) -> tuple[Tensor, np.ndarray]:
    """Features of overlapping classes of unequal size, with means and deviations far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    targets = np.arange(count) % 6 // 2 * (np.arange(count) % 5 > 0)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(9))
    features = torch.randn(count, width, generator=generator) + 0.5 * centres[targets]
    return 3 + features * torch.linspace(0.1, 4, width), targets


def dataset(folder: Path, features: Tensor, targets: np.ndarray, bad: int | None = None) -> FeatureDataset:
    cache = FeatureCache(folder, len(features), 1)
    for view, first in cache.chunks():
        rows = cache.rows(first)
        faults = {bad: "broken"} if bad is not None and bad in rows else {}
        cache.write(view, first, features[list(rows)], faults)
    return cache.open(targets)


def problem(folder: Path, count: int = 40, width: int = 12, **options: Any) -> tuple[Problem, np.ndarray, np.ndarray]:
    """A problem, with its standardised features and targets as arrays."""
    features, targets = images(count, width)
    weigh = options.pop("weigh", None)
    found = open_problem(Rows(group(), dataset(folder, features, targets), weigh), CLASSES, **options)
    scaled = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    return found, scaled.numpy(), targets


def weights_of_classes(targets: Tensor, positions: Tensor) -> Tensor:
    return torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)[targets]


@pytest.mark.parametrize("width", [12, 60])  # fewer and more features than images
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_is_that_of_scikit_learn(tmp_path: Path, width: int, weighted: bool) -> None:
    from sklearn.linear_model import Ridge

    weigh = weights_of_classes if weighted else None
    found, features, targets = problem(tmp_path, width=width, weigh=weigh)
    weight, bias = fit_ridge(found, [3.0, 0.1]).linear or pytest.fail("it is linear")
    of_images = np.array([0.5, 2.0, 3.0])[targets] if weighted else np.ones(len(targets))
    for number, penalty in enumerate([3.0, 0.1]):
        model = Ridge(alpha=penalty * of_images.sum()).fit(features, np.eye(CLASSES)[targets], of_images)
        np.testing.assert_allclose(weight[number], model.coef_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bias[number], model.intercept_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [12, 60])
def test_lda_is_that_of_scikit_learn(tmp_path: Path, width: int) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    found, features, targets = problem(tmp_path, width=width)
    weight, bias = fit_lda(found, [0.5, 0.1]).linear or pytest.fail("it is linear")
    for number, shrinkage in enumerate([0.5, 0.1]):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, targets)
        np.testing.assert_allclose(weight[number], model.coef_, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(bias[number], model.intercept_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_regression_is_that_of_scikit_learn(tmp_path: Path, weighted: bool) -> None:
    from sklearn.linear_model import LogisticRegression

    found, features, targets = problem(tmp_path, weigh=weights_of_classes if weighted else None)
    fitted = fit_logistic(found, [1.0, 0.1])
    weight, bias = fitted.linear or pytest.fail("it is linear")
    of_images = np.array([0.5, 2.0, 3.0])[targets] if weighted else np.ones(len(targets))
    for number, penalty in enumerate([1.0, 0.1]):
        model = LogisticRegression(C=1 / (penalty * of_images.sum()), tol=1e-8, max_iter=1000)
        model.fit(features, targets, of_images)
        np.testing.assert_allclose(weight[number], model.coef_, atol=2e-3)
        np.testing.assert_allclose(bias[number] - bias[number].mean(), model.intercept_, atol=2e-3)


def test_smoothing_and_offsets_are_in_the_loss(tmp_path: Path) -> None:
    offsets = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    found, features, targets = problem(tmp_path, smoothing=0.2, offsets=offsets)
    weight, bias = fit_logistic(found, [0.3]).linear or pytest.fail("it is linear")
    point = torch.cat([weight[0], bias[0][:, None]], dim=1).requires_grad_()
    logits = torch.from_numpy(features) @ point[:, :-1].T + point[:, -1] + offsets
    loss = F.cross_entropy(logits, torch.from_numpy(targets), label_smoothing=0.2)
    (loss + 0.15 * point[:, :-1].square().sum()).backward()  # type: ignore[no-untyped-call]
    assert point.grad is not None
    assert float(point.grad.abs().max()) < 2e-4


def test_prototypes_and_cosine_are_their_formulas(tmp_path: Path) -> None:
    found, features, targets = problem(tmp_path)
    means = np.stack([features[targets == c].mean(0) for c in range(CLASSES)])
    distances = ((features[:, None] - means) ** 2).sum(2)
    inputs = torch.from_numpy(features).float()
    logits = fit_prototypes(found).logits(inputs)[:, 0]
    expected = torch.from_numpy(-distances / 2 / 12).softmax(1)
    torch.testing.assert_close(logits.softmax(1).double(), expected, rtol=1e-4, atol=1e-5)

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centres = np.stack([unit[targets == c].mean(0) for c in range(CLASSES)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    np.testing.assert_allclose(fit_cosine(found).logits(inputs)[:, 0], unit @ centres.T, atol=1e-5)


def test_neighbours_vote_by_their_similarity(tmp_path: Path) -> None:
    found, features, targets = problem(tmp_path)
    fitted = fit_knn(found, (5, 1, 100))
    assert fitted.settings == [{"k": 5.0}, {"k": 1.0}], "there are 40 images"
    others = images(7, 12, seed=4)[0].numpy()
    unit, query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, others))
    shares = fitted.logits(torch.from_numpy(others).float()).exp().numpy()
    for number, k in enumerate([5, 1]):
        for row, similar in zip(shares[:, number], query @ unit.T, strict=True):
            nearest = np.argsort(-similar)[:k]
            votes = np.bincount(targets[nearest], np.exp(similar[nearest] / TEMPERATURE), minlength=CLASSES)
            np.testing.assert_allclose(row, (1 - UNIFORM) * votes / votes.sum() + UNIFORM / CLASSES, atol=1e-4)


def test_a_small_network_learns_what_no_linear_layer_can(tmp_path: Path) -> None:
    features = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    targets = ((features[:, 0] > 0) ^ (features[:, 1] > 0)).long().numpy()
    found = open_problem(Rows(group(), dataset(tmp_path, features, targets)), 2)
    fitted = fit_mlp(found)
    assert (fitted.logits(features)[:, 0].argmax(1).numpy() == targets).mean() > 0.8
    linear = fit_ridge(found, [0.1]).logits(features)[:, 0].argmax(1).numpy()
    assert (linear == targets).mean() < 0.65


@pytest.mark.parametrize("kind", FITTED_HEADS)
def test_standardisation_is_part_of_the_head(tmp_path: Path, kind: str) -> None:
    features, targets = images(60, 9)
    features[:, 4] = 7.0  # a constant feature
    data = dataset(tmp_path, features, targets, bad=59)
    found = open_problem(Rows(group(), data), CLASSES)
    choice = choose(kind, found, Rows(group(), data).standardized(found.standard), "top1")
    head = choice.chosen
    layer = {"mlp": MlpHead, "cosine": CosineHead}.get(kind, nn.Linear)(9, CLASSES).double()
    layer.load_state_dict(choice.fitted.tensors(choice.number, head["scale"], found.standard))
    logits = layer(features[:59].double()).detach()
    assert float((logits.argmax(1).numpy() == targets[:59]).mean()) == pytest.approx(head["top1"])
    loss = F.cross_entropy(logits, torch.from_numpy(targets[:59]))
    assert float(loss) == pytest.approx(head["loss"], rel=1e-4)
    assert head["top1"] == max(each["top1"] for each in choice.heads)
    assert choice.to_json()["heads"] == choice.heads


def test_the_choice_is_by_the_metric_and_one_candidate_can_be_fitted_again(tmp_path: Path) -> None:
    found, *_ = problem(tmp_path, count=50, width=30)
    val = Rows(group(), dataset(tmp_path / "val", *images(40, 30, seed=3))).standardized(found.standard)
    for kind in (*FITTED_HEADS, *COMPARED_HEADS):
        chosen = choose(kind, found, val, "loss").chosen
        assert chosen["loss"] == min(head["loss"] for head in choose(kind, found, val, "loss").heads)
        settings = {key: value for key, value in chosen.items() if key not in ("top1", "loss")}
        again = choose(kind, found, val, "loss", settings)
        assert len(again.heads) == 1
        assert again.chosen["loss"] == pytest.approx(chosen["loss"], rel=1e-6)


@pytest.mark.parametrize("width", [12, 300])
@pytest.mark.parametrize("case", ["last", "first", "one class", "weight 0"])
def test_a_class_without_images_is_not_predicted(tmp_path: Path, width: int, case: str) -> None:
    features, targets = images(40, width)
    empty = 0 if case in ("first", "one class") else CLASSES
    targets = np.ones_like(targets) if case == "one class" else targets + (case == "first")
    if case == "weight 0":
        targets[::7] = empty
    rows = Rows(group(), dataset(tmp_path, features, targets), lambda targets, _: (targets != empty).double())
    found = open_problem(rows, CLASSES + 1)
    others = found.standard.apply(images(400, width, seed=5)[0])
    for kind in (*FITTED_HEADS, *COMPARED_HEADS):
        if case == "one class" and kind in ("logistic", "ridge", "mlp"):
            continue
        logits = fit(kind, found).logits(others)
        assert logits.isfinite().all()
        assert not (logits.argmax(2) == empty).any() or kind == "mlp", kind


@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("kind", ["ridge", "lda", "prototypes", "cosine"])
def test_the_scale_of_logits_is_no_end_of_its_path(tmp_path: Path, kind: str, classes: int) -> None:
    targets = np.arange(classes * 12) % classes
    centres = torch.randn(classes, 40, generator=torch.Generator().manual_seed(2))
    found, val = None, None
    for seed in (0, 1):
        noise = torch.randn(len(targets), 40, generator=torch.Generator().manual_seed(seed))
        rows = Rows(group(), dataset(tmp_path / str(seed), centres[targets] + 0.7 * noise, targets))
        found, val = found or open_problem(rows, classes), rows
    assert found is not None
    assert val is not None
    chosen = choose(kind, found, val.standardized(found.standard), "top1").chosen
    assert SCALES[0] < chosen["scale"] < SCALES[-1]
    assert chosen["loss"] < 0.5 * np.log(classes)


def test_the_path_of_logistic_regression_is_longer_for_more_images() -> None:
    assert path_of(800)[-1] == 1e-3
    assert path_of(1_300_000)[-1] == 1e-6
    assert path_to(1e-4) == path_of(10_000)


def test_logistic_regression_is_that_of_scikit_learn_with_many_classes(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    targets = np.arange(1200) % 100
    centres = torch.randn(100, 20, generator=torch.Generator().manual_seed(2))
    features = centres[targets] + torch.randn(1200, 20, generator=torch.Generator().manual_seed(3))
    found = open_problem(Rows(group(), dataset(tmp_path, features, targets)), 100)
    weight, bias = fit_logistic(found, [0.01, 0.001]).linear or pytest.fail("it is linear")
    scaled = found.standard.apply(features).double().numpy()
    model = LogisticRegression(C=1 / (0.001 * 1200), tol=1e-8, max_iter=2000).fit(scaled, targets)
    logits = scaled @ weight[1].numpy().T + bias[1].numpy()
    same = (logits.argmax(1) == model.predict(scaled)).mean()
    assert same > 0.99
    losses = [-np.log(p[np.arange(1200), targets]).mean() for p in (softmax(logits), model.predict_proba(scaled))]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()


def test_images_of_weight_0_have_no_vote(tmp_path: Path) -> None:
    found, _, targets = problem(tmp_path, weigh=lambda targets, positions: (positions % 2 == 0).double())
    others = torch.from_numpy(images(7, 12, seed=4)[0].numpy()).float()
    half = Rows(group(), dataset(tmp_path / "half", images(40, 12)[0][::2], targets[::2]), None, found.standard)
    kept = Problem(half, found.standard, torch.bincount(torch.from_numpy(targets[::2])))
    torch.testing.assert_close(fit_knn(found, (5, 1)).logits(others), fit_knn(kept, (5, 1)).logits(others))


def test_a_feature_that_varies_by_rounding_alone_is_constant(tmp_path: Path) -> None:
    features, targets = images(3000, 4)
    features[:, 2] = 123.456
    found = open_problem(Rows(group(), dataset(tmp_path, features, targets)), CLASSES)
    assert float(found.standard.deviation[2]) == 1.0


def test_lda_of_features_without_spread_within_classes(tmp_path: Path) -> None:
    centres, targets = torch.randn(CLASSES, 30, generator=torch.Generator().manual_seed(1)), np.arange(60) % CLASSES
    found = open_problem(Rows(group(), dataset(tmp_path, centres[targets], targets)), CLASSES)
    assert (fit_lda(found).logits(found.standard.apply(centres[targets])).argmax(2).numpy() == targets[:, None]).all()


def without_memory(folder: str, kind: str) -> str:
    """The message of a choice during which one rank has no memory."""
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu", timeout_seconds=60)) as info:
        features, targets = images(600, 20)
        data = dataset(Path(folder) / str(info.rank), features, targets)
        found = open_problem(Rows(group(info), data), CLASSES)
        val = Rows(group(info), data).standardized(found.standard)
        if info.rank == info.world_size - 1:

            def block(self: Rows, number: int) -> Part:
                raise torch.OutOfMemoryError("out of memory")

            Rows.block = block  # type: ignore[method-assign]
        with pytest.raises(UserError) as raised:
            choose(kind, found, val, "top1")
        return str(raised.value)


@pytest.mark.parametrize("kind", ["ridge", "logistic", "knn", "mlp"])
def test_a_rank_without_memory_ends_the_fit_on_all(tmp_path: Path, kind: str) -> None:
    first, second = run_ranks(2, without_memory, str(tmp_path), kind)
    assert first == second
    assert "too little memory" in first


def test_more_features_than_memory_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the system would end the process."""
    found, *_ = problem(tmp_path)
    monkeypatch.setattr(rows_module, "available_memory", lambda: 40 * 12 * 4 - 1)
    with pytest.raises(UserError, match="too little memory"):
        fit_knn(found)
    monkeypatch.setattr(rows_module, "available_memory", lambda: 40 * 12 * 4)
    fit_knn(found)


def test_nothing_to_fit_is_said(tmp_path: Path) -> None:
    features, targets = images(20, 5)
    broken = dataset(tmp_path / "a", features[:1], targets[:1], bad=0)
    with pytest.raises(UserError, match="no image"):
        open_problem(Rows(group(), broken), CLASSES)
    features[3, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="not finite"):
        open_problem(Rows(group(), dataset(tmp_path / "b", features, targets)), CLASSES)


@pytest.mark.parametrize("of_rank_zero", [0, 1])
def test_rank_zero_decides_for_all_whether_a_factorisation_failed(of_rank_zero: int) -> None:
    """A rank with another processor may fail where others do not, and must not leave them alone."""
    other: Any = SimpleNamespace(share=lambda own: torch.full_like(own, of_rank_zero))
    matrix = torch.eye(2).double() * (1 if of_rank_zero else -1)
    if of_rank_zero:
        with pytest.raises(NonFiniteError):
            _solve(other, matrix, matrix)
    else:
        _solve(other, matrix, matrix)


def fitted_on_ranks(folder: str) -> list[Any]:
    """The choices of all kinds of heads, and that they are equal on all ranks."""
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu", timeout_seconds=60)) as info:
        rows_module.AT_ONCE = 300  # larger sums are exchanged one after another
        features, targets = images(700, 20)
        data = dataset(Path(folder) / str(info.rank), features, targets, bad=300)
        found = open_problem(Rows(group(info), data, weights_of_classes), CLASSES)
        val = Rows(group(info), data).standardized(found.standard)
        choices = [choose(kind, found, val, "top1") for kind in (*FITTED_HEADS, *COMPARED_HEADS)]
        layers = [
            [tensor.tolist() for tensor in choice.fitted.tensors(choice.number, 1.0, found.standard).values()]
            for choice in choices[: len(FITTED_HEADS)]
        ]
        mine = [[choice.to_json() for choice in choices], layers]
        assert all(each == mine for each in gather_objects(info, mine))
        return mine


def test_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    one, two, four = (run_ranks(world, fitted_on_ranks, str(tmp_path / str(world)))[0] for world in (1, 2, 4))
    assert one == two == four
