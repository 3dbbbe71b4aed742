"""Read-outs of networks that pool in a function: their own code pools several feature maps of each image.

A layer before the pooling gives further rows besides those of the images: an average of equal values is that value, so
a row whose places all have the maximum comes out of the pooling as the maximum, and passes the layers after it as the
average does. The heads wait until the network is done, and then get the rows of each image side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distil_tl.models.graph.trace import CalledLater, TracedInto
from distil_tl.models.taps import Taps, become


class Waiting(Taps):
    """The inputs of heads that wait for the end of a pass, apart for each thread."""

    def __init__(self) -> None:
        super().__init__()
        self._threads: set[int] = set()

    def begin(self) -> None:
        self._threads.add(threading.get_ident())

    def end(self) -> None:
        self._threads.discard(threading.get_ident())

    @property
    def is_open(self) -> bool:
        return threading.get_ident() in self._threads

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return Waiting()


@dataclass(frozen=True)
class Plan:
    """How the heads of a network get their inputs.

    Attributes:
        heads: paths of the heads.
        dropouts: for each of them, the paths of those before it.
        rows: how many rows each image has at the end.
        chosen: of them, those that a head gets, in order.
        averages: how many averages of earlier stages come before them.
    """

    heads: tuple[str, ...]
    dropouts: tuple[tuple[str, ...], ...]
    rows: int
    chosen: tuple[int, ...]
    averages: int


class Waits(CalledLater):
    """A head that first keeps its input, or with no `place` a dropout before it that first does nothing."""

    waiting: Waiting
    place: int | None

    @property
    def is_first_call(self) -> bool:
        return self.waiting.is_open

    def forward(self, values: Tensor) -> Any:
        if not self.waiting.is_open:
            return super().forward(values)
        if self.place is None:
            return values
        self.waiting.put(self.place, values)
        layer: Any = self
        classes = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        return values.flatten(1)[:, :1].expand(-1, classes)  # of the shape that the code expects

    def hand_over(self, layer: nn.Module) -> None:
        """Have a head that replaces this one wait in its place."""
        become(layer, Waits, waiting=self.waiting, place=self.place)


class ReadsOut(TracedInto):
    """A network whose heads are called at its end. The logits of several heads are averaged."""

    waiting: Waiting
    earlier: Taps
    plan: Plan

    def forward(self, images: Tensor) -> Tensor:
        self.waiting.begin()
        try:
            super().forward(images)
        finally:
            self.waiting.end()
        plan = self.plan
        inputs, averages = self.waiting.take(len(plan.heads)), self.earlier.take(plan.averages)
        logits = [
            self._logits(self.get_submodule(path), dropouts, torch.unflatten(given, 0, (plan.rows, -1)), averages)
            for path, dropouts, given in zip(plan.heads, plan.dropouts, inputs, strict=True)
        ]
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)

    def _logits(self, head: nn.Module, dropouts: Sequence[str], rows: Tensor, averages: Sequence[Tensor]) -> Tensor:
        is_convolution = isinstance(head, nn.Conv2d)
        before = [average[:, :, None, None] for average in averages] if is_convolution else averages
        joined = torch.cat([*before, *(rows[row] for row in self.plan.chosen)], 1)
        for path in dropouts:
            joined = self.get_submodule(path)(joined)
        logits: Tensor = head(joined)
        return logits.flatten(1) if is_convolution else logits


class GivesTokens(TracedInto):
    """A block that also gives its output [N, T, C], or that with its first token in all places."""

    taps: Taps
    place: int
    only_first: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = super().forward(*args, **kwargs)
        self.taps.put(self.place, tokens[:, :1].expand_as(tokens) if self.only_first else tokens)
        return tokens


class JoinsRows(TracedInto):
    """A block that gives the tokens of `count` earlier blocks as rows before its own."""

    taps: Taps
    count: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super().forward(*args, **kwargs)
        return torch.cat([*self.taps.take(self.count), own], 0)


class AddsRow(TracedInto):
    """A layer with a further row for each image, whose places all have a part of the last row that was there.

    Attributes:
        part: `maximum`, `mean` of the patches, or the class `token`.
        rows: that were there.
        places: the dimensions of its output that are pooled.
        first: tokens before those of the patches.
    """

    part: str
    rows: int
    places: tuple[int, ...]
    first: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        own = torch.unflatten(output, 0, (self.rows, -1))[self.rows - 1]
        if self.part == "maximum":
            value = own.amax(self.places, keepdim=True)
        else:
            value = own[:, :1] if self.part == "token" else own[:, self.first :].mean(1, keepdim=True)
        return torch.cat([output, value.expand_as(own)], 0)
