"""Interpolation between the first and the last or best weights of a stage (WiSE-FT: Wortsman et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distil_tl.training.config import rank_by

# Shares of the last or best weights. 1.0 comes first, as it has been evaluated already.
ALPHAS = (1.0, 0.8, 0.6, 0.4, 0.2)


class Interpolation:
    """The weights with which a stage began, and those of one of its epochs. Both are in the memory of the host.

    Args:
        tensors: of the model, by their names in it, at the beginning of the stage.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = list(tensors)
        self._weights = list(tensors.values())
        self._start = [tensor.detach().to("cpu", copy=True) for tensor in self._weights]
        self._end = [tensor.clone() for tensor in self._start]
        self.figures: dict[str, Any] | None = None

    @torch.no_grad()
    def offer(self, figures: Mapping[str, Any], metric: str, *, preferred: bool) -> None:
        """Keep the weights that the model holds, if their evaluation is the best of the stage so far, or preferred."""
        if preferred or self.figures is None or rank_by(metric, figures) < rank_by(metric, self.figures):
            self.figures = dict(figures)
            for end, weight in zip(self._end, self._weights, strict=True):
                end.copy_(weight)

    @torch.no_grad()
    def apply(self, alpha: float) -> None:
        """Put `(1 - alpha) * start + alpha * end` into the model, in place."""
        for weight, start, end in zip(self._weights, self._start, self._end, strict=True):
            weight.copy_(torch.lerp(start.to(weight.device), end.to(weight.device), alpha))  # exact at both ends

    def state(self) -> dict[str, Any]:
        """Both weights, for a checkpoint."""
        tensors = {"start": self._start, "best": self._end}  # "best": as in earlier checkpoints
        return {
            **{which: dict(zip(self._names, held, strict=True)) for which, held in tensors.items()},
            "figures": self.figures,
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        self.figures = state["figures"]
        for which, held in (("start", self._start), ("best", self._end)):
            for name, tensor in zip(self._names, held, strict=True):
                tensor.copy_(state[which][name])


def best_alpha(metric: str, figures: Mapping[float, Mapping[str, Any]]) -> float:
    """The alpha with the best metric; of equal ones the nearest to 1."""
    return min(figures, key=lambda alpha: (rank_by(metric, figures[alpha])[0], -alpha))
