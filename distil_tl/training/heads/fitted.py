"""Fitted heads: the candidates of a path of settings, as functions from standardised features to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distil_tl.training.heads.rows import Standard

Settings = dict[str, float]

# Factors of logits. The best one of ridge regression is near 2,000 with 1,000 classes, that of LDA near 1/100 with few.
SCALES = tuple(2.0**power for power in range(-8, 17))
GAP = 1e-3  # of logits


@dataclass(frozen=True)
class Fitted:
    """The candidates of a path.

    Attributes:
        settings: of each candidate, the most regularised first.
        scales: factors of the logits, of which val decides one for each candidate.
        logits: standardised float32 [N, D] to [N, K, C] for K candidates.
        linear: weight and bias of each candidate for standardised features, float64 [K, C, D] and [K, C]; None where
            it is not a linear layer.
        built: as `tensors`, where a network is built with this kind of head; None elsewhere.
    """

    settings: list[Settings]
    scales: tuple[float, ...]
    logits: Callable[[Tensor], Tensor]
    linear: tuple[Tensor, Tensor] | None = None
    built: Callable[[int, float, Standard], dict[str, Tensor]] | None = None

    @classmethod
    def of_linear(cls, settings: list[Settings], scales: tuple[float, ...], weight: Tensor, bias: Tensor) -> Fitted:
        columns, rest = weight.float().flatten(0, 1).T.contiguous(), bias.float()

        def logits(features: Tensor) -> Tensor:
            return (features @ columns).view(len(features), *rest.shape) + rest

        return cls(settings, scales, logits, (weight, bias))

    def tensors(self, number: int, scale: float, standard: Standard) -> dict[str, Tensor]:
        """The state of the head of a candidate, float64, for features as they are."""
        if self.built is not None:
            return self.built(number, scale, standard)
        assert self.linear is not None
        weight, bias = (column[number] * scale for column in self.linear)
        return standard.folded_into(weight, bias)


def below_others(weight: Tensor, class_weight: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """Weights by which classes without images have the mean logit of the others less `gap`: never the largest one.

    Args:
        weight: [C, D].
        class_weight: of the images of each class, [C].

    Returns:
        The weights, and what is to be added to the logits, [C].
    """
    seen = class_weight > 0
    return torch.where(seen[:, None], weight, weight[seen].mean(dim=0)), torch.where(seen, 0.0, -gap)


def stacked(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    weights, biases = zip(*layers, strict=True)
    return torch.stack(weights), torch.stack(biases)
