"""The training loss: against the formulas of its papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distil_tl.training.config import OptimConfig
from distil_tl.training.losses import Loss, training_loss

CPU = torch.device("cpu")
COUNTS = np.array([900, 90, 10])
LOGITS = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)) * 2
TARGETS = torch.arange(64) % 3


def losses(balance: str = "none", **optim: object) -> torch.Tensor:
    return training_loss(OptimConfig(**optim), balance, COUNTS, CPU)(LOGITS, TARGETS)  # type: ignore[arg-type]


def test_by_default_it_is_cross_entropy() -> None:
    assert torch.equal(losses(), F.cross_entropy(LOGITS, TARGETS, reduction="none"))
    assert torch.equal(
        losses("sampler", label_smoothing=0.2), F.cross_entropy(LOGITS, TARGETS, reduction="none", label_smoothing=0.2)
    )


def test_focal() -> None:
    p = LOGITS.double().softmax(1)[range(64), TARGETS]
    expected = (-((1 - p) ** 2.5) * p.log()).float()
    torch.testing.assert_close(losses(loss="focal", focal_gamma=2.5), expected)
    assert torch.equal(losses(loss="focal", focal_gamma=0), losses())


def test_weights_are_the_inverse_of_the_counts_with_mean_1_over_images() -> None:
    weights = torch.tensor([1000 / 900, 1000 / 90, 1000 / 10]) / 3
    torch.testing.assert_close(losses("weights"), F.cross_entropy(LOGITS, TARGETS, weight=weights, reduction="none"))
    assert (weights * torch.tensor(COUNTS)).sum() == pytest.approx(1000)


def test_effective_number_lies_between_none_and_weights() -> None:
    found = training_loss(OptimConfig(effective_beta=0.99), "effective_number", COUNTS, CPU).weights
    assert found is not None
    expected = np.array([0.01 / (1 - 0.99**n) for n in COUNTS])
    torch.testing.assert_close(found / found[0], torch.tensor(expected / expected[0], dtype=torch.float32))
    assert (found * torch.tensor(COUNTS)).sum() == pytest.approx(1000)
    torch.testing.assert_close(losses("effective_number", effective_beta=0.0), losses())
    torch.testing.assert_close(
        losses("effective_number", effective_beta=1 - 1e-9), losses("weights"), rtol=1e-4, atol=1e-5
    )


def test_logit_adjustment_adds_the_logarithm_of_the_class_frequency() -> None:
    adjusted = LOGITS + torch.tensor(COUNTS / 1000).log().float()
    torch.testing.assert_close(losses("logit_adjust"), F.cross_entropy(adjusted, TARGETS, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_slopes_are_finite_where_the_target_is_certain(gamma: float) -> None:
    loss = training_loss(OptimConfig(loss="focal", focal_gamma=gamma), "none", COUNTS, CPU)
    certain = torch.tensor([[200.0, 0, 0], [-200.0, 0, 0]])
    slopes = loss.slopes(certain.softmax(1)[:, None], F.one_hot(torch.tensor([0, 0]), 3).float())
    assert slopes.isfinite().all()
    assert torch.equal(slopes[0], torch.zeros(1, 3))


@pytest.mark.parametrize("gamma", [None, 1.0, 2.0])
def test_slopes_are_the_gradient(gamma: float | None) -> None:
    loss, logits = Loss(gamma=gamma), LOGITS.clone().requires_grad_()
    loss(logits, TARGETS).sum().backward()  # type: ignore[no-untyped-call]
    found = loss.slopes(LOGITS.softmax(1)[:, None], F.one_hot(TARGETS, 3).float())[:, 0]
    torch.testing.assert_close(found, logits.grad)


def test_settings_without_meaning_are_refused() -> None:
    assert "no label smoothing" in OptimConfig(loss="focal", label_smoothing=0.1).problems()[0]
    assert "choose one of cross_entropy, focal" in OptimConfig(loss="dice").problems()[0]
    assert "focal_gamma must be 0, or at least 1" in OptimConfig(focal_gamma=0.5).problems()[0]
    assert "effective_beta must be" in OptimConfig(effective_beta=1.0).problems()[0]


def test_weights_of_images_are_1_on_average_and_multiply_those_of_classes() -> None:
    weights = np.array([3.0, 0.0, 1.0, 4.0], dtype=np.float32)
    loss = training_loss(OptimConfig(), "weights", COUNTS, CPU, weights)
    plain = training_loss(OptimConfig(), "weights", COUNTS, CPU)
    indices = torch.tensor([3, 1, 0, 2])[: len(TARGETS)]
    factors = torch.tensor(weights / 2)[indices]
    torch.testing.assert_close(loss(LOGITS[:4], TARGETS[:4], indices), plain(LOGITS[:4], TARGETS[:4]) * factors)
    torch.testing.assert_close(
        loss.weighted(factors.new_ones(4), TARGETS[:4], indices), plain.weighted(factors, TARGETS[:4])
    )
