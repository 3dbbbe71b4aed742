"""Metrics against scikit-learn, and their sums over parts."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training import metrics as metrics_module
from distil_tl.training.batched_heads import count_predictions
from distil_tl.training.metrics import ClassificationMetrics, Meter

sk = pytest.importorskip("sklearn.metrics")

CPU = torch.device("cpu")
ALONE = DistInfo(Launch(), CPU, 1.0)


def random_batch(n: int, classes: int, seed: int, *, of: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] and targets among the first `of` classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(of or classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator) + 1.5 * F.one_hot(targets, classes)
    return logits, targets


def add(metrics: ClassificationMetrics | Meter, logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> None:
    losses = F.cross_entropy(logits, targets, reduction="none")
    metrics.update(logits, targets, losses, torch.ones(len(targets), dtype=torch.bool) if valid is None else valid)


def counted(logits: Tensor, targets: Tensor, *, confusion: bool = True) -> ClassificationMetrics:
    metrics = ClassificationMetrics(logits.shape[1], CPU, confusion=confusion)
    add(metrics, logits, targets)
    return metrics


def test_of_equal_logits_the_first_classes_are_the_top_five() -> None:
    targets = torch.arange(10)
    for found in (counted(torch.zeros(10, 10), targets), of_heads(torch.zeros(10, 10), targets)):
        assert found.compute()["top5"] == 0.5
        assert found.compute()["top1"] == 0.1
    assert counted(torch.full((10, 10), torch.nan), targets).compute()["top5"] == 0.0


@pytest.mark.parametrize("classes", [3, 12])
def test_heads_of_a_search_are_counted_like_a_network(classes: int) -> None:
    logits, targets = random_batch(200, classes, 1)
    logits = logits.round()  # with equal ones
    assert of_heads(logits, targets).compute() == pytest.approx(counted(logits, targets).compute())


def of_heads(logits: Tensor, targets: Tensor) -> ClassificationMetrics:
    valid = torch.ones(len(targets), dtype=torch.bool)
    return ClassificationMetrics.of(count_predictions(logits[:, None], targets, valid)[0], logits.shape[1])


def names(classes: int) -> list[str]:
    return [f"class {i}" for i in range(classes)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(2, 12), st.integers(0, 10**6))
def test_figures_are_scikit_learns(n: int, classes: int, seed: int):
    logits, targets = random_batch(n, classes, seed, of=max(2, classes - 2))  # some classes never occur
    predicted, labels = logits.argmax(1).numpy(), np.arange(classes)
    metrics = counted(logits, targets)
    found = metrics.compute()
    assert metrics.count == n
    assert found["loss"] == pytest.approx(sk.log_loss(targets, logits.double().softmax(1), labels=labels), rel=1e-5)
    assert found["top1"] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert found["balanced_accuracy"] == pytest.approx(
        sk.recall_score(targets, predicted, average="macro", labels=np.unique(targets))
    )
    # Without `labels`, scikit-learn averages over the classes that occur among targets or predictions.
    assert found["macro_f1"] == pytest.approx(sk.f1_score(targets, predicted, average="macro", zero_division=0))
    assert metrics.confusion_matrix() == sk.confusion_matrix(targets, predicted, labels=labels).tolist()
    if classes > 5:
        top5 = sk.top_k_accuracy_score(targets, logits.numpy(), k=5, labels=labels)
        assert found["top5"] == pytest.approx(top5)


def test_rows_of_classes_are_scikit_learns():
    logits, targets = random_batch(200, 6, 0)
    precision, recall, f1, n = sk.precision_recall_fscore_support(targets, logits.argmax(1))
    rows = counted(logits, targets).per_class(names(6))
    for key, column in (("precision", precision), ("recall", recall), ("f1", f1), ("n", n)):
        assert [row[key] for row in rows] == pytest.approx(column.tolist())
    assert [row["class"] for row in rows] == names(6)


def test_ratios_without_a_denominator_are_none():
    logits = F.one_hot(torch.tensor([0, 0, 1]), 4).float()
    rows = counted(logits, torch.tensor([0, 2, 2])).per_class(names(4))
    ratios = [(row["n"], row["correct"], row["predicted"], row["recall"], row["precision"], row["f1"]) for row in rows]
    assert ratios == [
        (1, 1, 2, 1.0, 0.5, pytest.approx(2 / 3)),
        (0, 0, 1, None, 0.0, 0.0),
        (2, 0, 0, 0.0, None, 0.0),
        (0, 0, 0, None, None, None),
    ]


def test_every_class_is_named():
    with pytest.raises(ValueError, match="zip"):
        counted(*random_batch(5, 4, 0)).per_class(names(3))


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_with_five_classes_or_fewer_the_target_is_always_among_the_top_five(classes: int):
    assert counted(*random_batch(20, classes, 0)).compute()["top5"] == 1.0


def test_top5_counts_the_fifth_and_not_the_sixth():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(2, 1)
    assert counted(logits, torch.tensor([4, 5])).compute()["top5"] == 0.5


def test_nothing_counted_is_zero_and_not_an_error():
    metrics = ClassificationMetrics(3, CPU)
    names = ("loss", "top1", "top5", "macro_f1", "balanced_accuracy")
    assert metrics.compute() == dict.fromkeys(names, 0.0)
    assert metrics.count == 0
    add(metrics, torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert metrics.count == 0


def assert_same(one: ClassificationMetrics, other: ClassificationMetrics) -> None:
    a, b = one.compute(), other.compute()
    assert a.pop("loss") == pytest.approx(b.pop("loss"), rel=1e-5)  # float32 losses of other batches
    assert a == b
    assert one.count == other.count
    assert one.per_class(names(one.num_classes)) == other.per_class(names(other.num_classes))


def test_samples_that_are_not_valid_do_not_count():
    logits, targets = random_batch(40, 7, 0)
    valid = torch.arange(40) % 3 > 0
    metrics = ClassificationMetrics(7, CPU, confusion=True)
    add(metrics, logits, targets, valid)
    expected = counted(logits[valid], targets[valid])
    assert_same(metrics, expected)
    assert metrics.confusion_matrix() == expected.confusion_matrix()
    assert metrics.count == 26


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 40), max_size=4), st.integers(0, 1000))
def test_the_sum_of_parts_is_the_whole(cuts: list[int], seed: int):
    """As ranks do: each counts its own share of any length, and only the sums are added."""
    logits, targets = random_batch(40, 7, seed)
    parts = [counted(logits[a:b], targets[a:b]) for a, b in pairwise([0, *sorted(cuts), 40])]
    sums = torch.stack([part.reduce(ALONE)._sums for part in parts]).sum(dim=0)
    summed = ClassificationMetrics(7, CPU)
    summed._sums.copy_(sums)
    assert_same(summed, counted(logits, targets))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 40), max_size=4), st.integers(0, 1000))
def test_batches_of_any_size_count_alike(cuts: list[int], seed: int):
    logits, targets = random_batch(40, 7, seed)
    metrics = ClassificationMetrics(7, CPU)
    for a, b in pairwise([0, *sorted(cuts), 40]):
        add(metrics, logits[a:b], targets[a:b])
    assert_same(metrics, counted(logits, targets))


def test_reduced_metrics_are_a_copy():
    metrics = counted(*random_batch(10, 3, 0))
    reduced = metrics.reduce(ALONE)
    before = reduced.compute()
    add(metrics, *random_batch(10, 3, 1))
    assert reduced.compute() == before
    assert (reduced.count, metrics.count) == (10, 20)


def test_counts_since_an_earlier_state():
    first, second = random_batch(10, 4, 0), random_batch(15, 4, 1)
    metrics = counted(*first)
    earlier = metrics.reduce(ALONE)._sums
    add(metrics, *second)
    assert_same(metrics.reduce(ALONE).since(earlier), counted(*second))
    assert metrics.count == 25


def test_counts_are_exact_beyond_float32():
    metrics = ClassificationMetrics(2, CPU)
    metrics._sums[1] = 2**24
    add(metrics, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert metrics.count == 2**24 + 1


# The meter of an epoch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the monotonic clock shows, to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_meter_counts_intervals_and_the_epoch(clock: list[float]):
    first, second = random_batch(10, 4, 0), random_batch(15, 4, 1)
    meter = Meter(ALONE, 4)
    clock[0] += 50
    meter.start()
    add(meter, *first)
    clock[0] += 2
    interval, seconds, _ = meter.interval()
    assert_same(interval, counted(*first))
    assert seconds == 2
    add(meter, *second)
    clock[0] += 3
    interval, seconds, _ = meter.interval()
    assert_same(interval, counted(*second))
    assert seconds == 3
    whole = ClassificationMetrics(4, CPU)
    add(whole, *first)
    add(whole, *second)
    assert_same(meter.total(), whole)
    assert meter.interval()[0].count == 0


def test_a_meter_survives_a_restart_in_the_middle_of_an_interval(clock: list[float]):
    batches = [random_batch(n, 4, n) for n in (10, 15, 20)]
    meter = Meter(ALONE, 4)
    meter.start()
    add(meter, *batches[0])
    meter.interval()
    add(meter, *batches[1])
    clock[0] += 2
    state = meter.state()
    assert isinstance(state["seconds"], float)
    add(meter, *batches[2])  # the state was a copy
    clock[0] += 1000

    resumed = Meter(ALONE, 4)
    resumed.load_state(state)
    clock[0] += 7  # until the loader's workers are up
    resumed.start()
    add(resumed, *batches[2])
    clock[0] += 3
    assert_same(resumed.total(), meter.total())
    interval, seconds, _ = resumed.interval()
    assert_same(interval, meter.interval()[0])
    assert seconds == 5
    clock[0] += 1
    assert resumed.interval()[1] == 1


def test_a_restart_on_several_ranks_takes_the_sums_over_once():
    meter = Meter(ALONE, 4)
    add(meter, *random_batch(10, 4, 0))
    state = meter.state()
    ranks = [Meter(DistInfo(Launch(rank=rank, world_size=3), CPU, 1.0), 4) for rank in range(3)]
    for rank in ranks:
        rank.load_state(state)
    assert [rank.total().count for rank in ranks] == [10, 0, 0]  # without a process group, nothing is summed


def test_a_confusion_matrix_only_when_asked_for_and_not_too_large(monkeypatch: pytest.MonkeyPatch):
    logits, targets = random_batch(5, 4, 0)
    assert counted(logits, targets, confusion=False).confusion_matrix() is None
    monkeypatch.setattr(metrics_module, "MAX_CONFUSION_CLASSES", 3)
    assert counted(logits, targets, confusion=True).confusion_matrix() is None
    assert counted(logits, targets).reduce(ALONE).confusion_matrix() is None
