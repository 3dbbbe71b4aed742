"""Interpolation between the first and the best weights of a stage (WiSE-FT: Wortsman et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distil_tl.training.config import rank_by

ALPHAS = (1.0, 0.8, 0.6, 0.4, 0.2)  # share of the best weights; the first are they themselves


class Interpolation:
    """The weights with which a stage began, and those of its best evaluation.

    Args:
        tensors: of the model, by their names in it, at the beginning of the stage.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = list(tensors)
        self._weights = list(tensors.values())
        self._start = [tensor.detach().clone() for tensor in self._weights]
        self._best = [tensor.detach().clone() for tensor in self._weights]
        self.figures: dict[str, Any] | None = None

    @torch.no_grad()
    def offer(self, figures: Mapping[str, Any], metric: str) -> None:
        """Keep the weights that the model holds, if their evaluation is the best of the stage so far."""
        if self.figures is None or rank_by(metric, figures) < rank_by(metric, self.figures):
            self.figures = dict(figures)
            torch._foreach_copy_(self._best, self._weights)

    @torch.no_grad()
    def apply(self, alpha: float) -> None:
        """Put `(1 - alpha) * start + alpha * best` into the model, in place."""
        for weight, start, best in zip(self._weights, self._start, self._best, strict=True):
            weight.copy_(torch.lerp(start, best, alpha))  # exact at both ends

    def state(self) -> dict[str, Any]:
        """Both weights, for a checkpoint."""
        tensors = {"start": self._start, "best": self._best}
        return {
            **{which: dict(zip(self._names, held, strict=True)) for which, held in tensors.items()},
            "figures": self.figures,
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        self.figures = state["figures"]
        for which, held in (("start", self._start), ("best", self._best)):
            for name, tensor in zip(self._names, held, strict=True):
                tensor.copy_(state[which][name])


def best_alpha(metric: str, figures: Mapping[float, Mapping[str, Any]]) -> float:
    """The alpha with the best metric; of equal ones the nearest to 1."""
    return min(figures, key=lambda alpha: (rank_by(metric, figures[alpha])[0], -alpha))
