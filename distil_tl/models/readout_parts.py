"""The parts that read-outs consist of. They lie side by side in a fixed order, and each read-out is a range of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAPS_ORDER = ("third_last", "second_last", "average", "maximum")  # averages of earlier stages, then of the last one
MAPS = {
    "pooled": ("average",),
    "avg_max": ("average", "maximum"),
    "last2": ("second_last", "average"),
    "last3": ("third_last", "second_last", "average"),
}
# Class tokens of the last four blocks, the last one at the end; the mean of the patches; the library's own pooling.
TOKENS_ORDER = ("fourth_token", "third_token", "second_token", "token", "mean", "own")
TOKENS = {
    "token": ("token",),
    "mean": ("mean",),
    "token_mean": ("token", "mean"),
    "last4": ("fourth_token", "third_token", "second_token", "token", "mean"),
}


class CannotReadOutError(Exception):
    """A network has no such read-out; the message is the reason."""


def joined(readouts: Mapping[str, Sequence[str]], order: Sequence[str]) -> tuple[str, ...]:
    """The parts of a network with all of these read-outs: a range of `order`."""
    places = [order.index(part) for parts in readouts.values() for part in parts]
    return tuple(order[min(places) : max(places) + 1])


def columns_of(
    readouts: Mapping[str, Sequence[str]], parts: Sequence[str], widths: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """The first column of each read-out and the one after its last, among those of `parts`."""
    ends, total = dict[str, int](), 0
    for part in parts:
        total += widths[part]
        ends[part] = total
    return {name: (ends[own[0]] - widths[own[0]], ends[own[-1]]) for name, own in readouts.items()}


def inputs_of(module: nn.Module, head: str) -> int:
    """How many values the head gets."""
    layer: Any = module.get_submodule(head)
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def apply_to_parts(module: nn.Module, paths: Iterable[str], parts: int) -> None:
    """Have the layers at `paths` compute each of several parts of their input by itself, in place."""
    for path in paths if parts > 1 else ():
        layer: Any = module.get_submodule(path)
        kind: Any = type(layer)
        layer.__class__ = _on_each_part(kind, parts)


@functools.cache
def _on_each_part(kind: Any, parts: int) -> Any:
    """The same layer for vectors or maps that hold several parts, of which it computes each one."""

    def forward(self: nn.Module, values: Tensor) -> Tensor:
        chunks = values.chunk(parts, 1)  # not a loop over them, as a graph may be traced
        return torch.cat([kind.forward(self, chunks[i]) for i in range(parts)], 1)

    return type(f"{kind.__name__}OnParts", (kind,), {"forward": forward, "__module__": kind.__module__})
