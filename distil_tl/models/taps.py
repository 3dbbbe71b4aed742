"""Taps: values of layers within a network that a later layer gets besides its own input.

The layers keep their names and weights; only their classes change. A tracer of graphs must trace into them (`Tapped`),
as the values do not pass through their inputs and outputs.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from distil_tl.models.graph.trace import TracedInto


class Taps:
    """Values on their way from the layers that give them to the layer that gets them, apart for each thread."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], Tensor] = {}

    def put(self, place: int, value: Tensor) -> None:
        self._values[threading.get_ident(), place] = value

    def take(self, count: int) -> list[Tensor]:
        """The values at the first `count` places, which are empty afterwards."""
        thread = threading.get_ident()
        return [self._values.pop((thread, place)) for place in range(count)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        """Without the values of a pass that failed. All layers of a copied network share one copy."""
        return Taps()


class GivesAverage(TracedInto):
    """A layer that also gives the average of its output, or of its first one, over the dimensions `places`."""

    taps: Taps
    place: int
    places: tuple[int, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        maps = output[0] if isinstance(output, (tuple, list)) else output
        self.taps.put(self.place, maps.mean(self.places))
        return output


class GivesClassToken(TracedInto):
    """A layer that also gives the first of its output's tokens [N, T, C]."""

    taps: Taps
    place: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = super().forward(*args, **kwargs)
        self.taps.put(self.place, tokens[:, 0])
        return tokens


class JoinsToOutput(TracedInto):
    """A layer whose output [N, C, 1, 1], [N, 1, 1, C] or [N, C] has `count` values before its own channels."""

    taps: Taps
    count: int
    channels: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super().forward(*args, **kwargs)
        values = self.taps.take(self.count)
        if own.ndim == 4:
            values = [value[:, :, None, None] if self.channels == 1 else value[:, None, None] for value in values]
        return torch.cat([*values, own], self.channels)


class JoinsToTokens(TracedInto):
    """A layer that gets `count` values as tokens before the tokens [N, T, C] that are its input."""

    taps: Taps
    count: int

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(torch.cat([*(value[:, None] for value in self.taps.take(self.count)), tokens], 1))


def become(layer: nn.Module, role: type[nn.Module], **attributes: Any) -> None:
    """Give a layer a role, such as those of this module, in place."""
    changed: Any = layer
    kind: Any = type(layer)
    wanted: Any = role
    changed.__class__ = _with_role(wanted, kind)
    for name, value in attributes.items():
        setattr(layer, name, value)


@functools.cache
def _with_role(role: Any, kind: Any) -> Any:
    return type(f"{kind.__name__}{role.__name__}", (role, kind), {"__module__": kind.__module__})
