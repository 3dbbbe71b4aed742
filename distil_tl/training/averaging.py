"""The exponential moving average of the weights of a stage (Polyak and Juditsky, 1992; the decay as in TensorFlow)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training changes in a model to which a stage is applied, by name: parameters, and statistics that train."""
    found: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for path, part in module.named_modules():
        if isinstance(part, _NormBase) and part.training:
            statistics = {"running_mean": part.running_mean, "running_var": part.running_var}
            found |= {f"{path}.{name}": buffer for name, buffer in statistics.items() if buffer is not None}
    return found


class WeightAverage:
    """The moving average of some tensors over the steps of a stage, and these tensors.

    While a stage trains, the model holds the raw weights. They change places with the average for each evaluation, in
    place: what refers to the parameters, such as a folded or compiled network, DDP or CUDA graphs, stays valid. The
    weights are equal on all ranks after each step, so the averages are, too.

    Args:
        decay: share of the average that a late step keeps.
        tensors: of the model, by their names in it.
    """

    def __init__(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self._names = list(tensors)
        self._weights = list(tensors.values())
        self._average = [tensor.detach().clone() for tensor in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step (from 0). A step that the optimizer left out adds the weights before it again.

        In the first steps the decay is lower, so that the average soon forgets the weights that the stage began with.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """The model holds the average in the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self._weights, self._average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def adopt(self) -> None:
        """Leave the average in the model for good."""
        torch._foreach_copy_(self._weights, self._average)

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict of the model with the average in it."""
        averages = {id(weight): average for weight, average in zip(self._weights, self._average, strict=True)}
        tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
        return {name: averages.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}

    def state(self) -> dict[str, Any]:
        """The raw weights. The average is in the weights of the checkpoint."""
        return {name: weight.detach() for name, weight in zip(self._names, self._weights, strict=True)}

    @torch.no_grad()
    def load_state(self, raw: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint whose weights, the average, are in the model, with these raw weights."""
        torch._foreach_copy_(self._average, self._weights)
        for name, weight in zip(self._names, self._weights, strict=True):
            weight.copy_(raw[name])
