"""Greedy soup: an average of the weights of several models, each of which improves it (Wortsman et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distil_tl.training.config import rank_by

Weights = Mapping[str, Tensor]


class Mean:
    """The mean of the state dicts added so far, computed in float64. Integers are those of the first one."""

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._count = 0

    def including(self, weights: Weights) -> dict[str, Tensor]:
        """The mean if `weights` were added, in their types."""
        if not self._count:
            return dict(weights)
        return {
            name: ((self._sum[name] + tensor) / (self._count + 1)).to(tensor.dtype)
            if tensor.is_floating_point()
            else self._sum[name]
            for name, tensor in weights.items()
        }

    def add(self, weights: Weights) -> None:
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                self._sum[name] = self._sum.get(name, 0) + tensor.to(torch.float64)
            else:
                self._sum.setdefault(name, tensor)
        self._count += 1


@dataclass(frozen=True)
class Trial:
    """What happened to one model: the figures of the average with it, and whether it was added."""

    figures: Mapping[str, Any]
    added: bool


def greedy_soup(
    models: Iterable[Weights], evaluate: Callable[[Weights], Mapping[str, Any]], metric: str
) -> tuple[Weights, list[Trial]]:
    """The average, and a trial for each model in order. A model is added if the average is better with it.

    Args:
        models: state dicts, the best first.
        evaluate: the figures of a state dict on val.
        metric: which decides, and of equal values the loss.
    """
    mean, trials = Mean(), list[Trial]()
    best: tuple[Weights, Mapping[str, Any]] | None = None
    for weights in models:
        mixed = mean.including(weights)
        figures = evaluate(mixed)
        added = best is None or rank_by(metric, figures) < rank_by(metric, best[1])
        if added:
            mean.add(weights)
            best = mixed, figures
        trials.append(Trial(figures, added))
    assert best is not None
    return best[0], trials
