"""Greedy soup: the mean of weights, and which models are added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from distil_tl.training.soup import Mean, greedy_soup


def weights(value: float, counted: int = 0) -> dict[str, Tensor]:
    return {"w": torch.tensor([value, -value]), "n": torch.tensor(counted)}


def test_the_mean_is_that_of_all_and_exact_for_one() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [{"w": torch.randn(5, 3, generator=generator), "n": torch.tensor(i)} for i in range(4)]
    mean = Mean()
    assert torch.equal(mean.including(given[0])["w"], given[0]["w"])
    for each in given[:3]:
        mean.add(each)
    found = mean.including(given[3])
    assert torch.allclose(found["w"], torch.stack([each["w"] for each in given]).mean(0))
    assert found["w"].dtype == torch.float32
    assert found["n"] == 0
    assert torch.equal(mean.including(given[3])["w"], found["w"]), "nothing was added"


def test_a_model_is_added_if_the_average_is_better_with_it() -> None:
    """The best weight is 2: the third model moves the average away from it, the fourth back to it."""

    def evaluate(found: Mapping[str, Tensor]) -> dict[str, float]:
        return {"top1": 1 - abs(float(found["w"][0]) - 2), "loss": 1.0}

    models = [weights(2.4, 7), weights(1.2, 8), weights(9.0), weights(2.4), weights(2.0)]
    soup, trials = greedy_soup(models, evaluate, "top1")
    assert [trial.added for trial in trials] == [True, True, False, True, False]
    assert torch.allclose(soup["w"], torch.tensor([2.0, -2.0]))
    assert soup["n"] == 7
    assert trials[2].figures["top1"] < trials[1].figures["top1"] < trials[3].figures["top1"]


def test_of_equal_figures_the_lower_loss_decides() -> None:
    for loss, added in ((0.9, True), (1.0, False), (1.1, False)):
        left = iter([1.0, loss])

        def evaluate(_: object, left: Iterator[float] = left) -> dict[str, float]:
            return {"top1": 0.5, "loss": next(left)}

        _, trials = greedy_soup([weights(1), weights(2)], evaluate, "top1")
        assert trials[1].added == added
