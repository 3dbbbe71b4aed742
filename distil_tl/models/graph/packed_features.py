"""Graphs in which the trained part gets one tensor, although it uses several values of the frozen part."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from distil_tl.models.graph.known_shapes import Values, batch_size


class CannotPackError(Exception):
    """What the trained part uses can't be one tensor with a row per image; the message is the reason."""


def pack(tensors: Sequence[Tensor], images: int) -> Tensor:
    """Several tensors as one with a row per image."""
    return torch.cat([tensor.reshape(images, -1) for tensor in tensors], 1)


def unpack(packed: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors in it, by their shapes for one image."""
    parts = torch.split(packed, [torch.Size(shape).numel() for shape in shapes], 1)
    return [part.reshape(len(packed) * rows, *rest) for part, (rows, *rest) in zip(parts, shapes, strict=True)]


def pack_frozen_values(
    graph: fx.Graph, values: Mapping[fx.Node, Values], varying: set[fx.Node]
) -> tuple[fx.Graph, fx.Node]:
    """A graph that computes the same, and a node of it: the only tensor through which its trained part uses the images.

    Args:
        values: of the frozen nodes, for two numbers of images.
        varying: nodes whose results may differ at the next call, as they are trained or random.

    Raises:
        CannotPackError: the trained part uses the images themselves, or something that is no tensor of numbers.
    """
    images = next(node for node in graph.nodes if node.op == "placeholder")
    late, of_images = set(varying), {images}
    for node in graph.nodes:
        if late.intersection(node.all_input_nodes) or node.op == "output":
            late.add(node)
        elif node.target is not batch_size and of_images.intersection(node.all_input_nodes):
            of_images.add(node)
    used = [node for node in graph.nodes if node in of_images - late and late.intersection(node.users)]
    if not used or images in used:
        raise CannotPackError("its trained part uses the images directly")

    packed = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node not in late:
            copies[node] = packed.node_copy(node, copies.__getitem__)
    parts = _Parts(packed, len(values[images][0]), len(values[images][1]))
    places = {node: parts.add(copies[node], values[node]) for node in used}
    if len(used) == len(parts.tensors) == 1 and parts.shapes[0][0] == 1:  # it needs no packing
        cut = copies[used[0]]
    else:
        number = packed.call_function(batch_size, (copies[images],))
        cut = packed.call_function(pack, (tuple(parts.tensors), number))
        apart = packed.call_function(unpack, (cut, tuple(parts.shapes)))
        again = [packed.call_function(operator.getitem, (apart, place)) for place in range(len(parts.tensors))]
        for node in used:
            copies[node] = parts.rebuild(places[node], again)
    for node in graph.nodes:
        if node in late:
            copies[node] = packed.node_copy(node, copies.__getitem__)
    return packed, cut


@dataclass
class _Parts:
    """The tensors of several values.

    Attributes:
        graph: that they are added to.
        fewer, more: images that the values were computed for.
        tensors: nodes.
        shapes: of the tensors for one image.
    """

    graph: fx.Graph
    fewer: int
    more: int
    tensors: list[fx.Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, node: fx.Node, values: Values) -> Any:
        """Add the tensors of a value. Returns their positions: one, or a list or tuple for a list or tuple."""
        one, two = values
        if isinstance(one, (tuple, list)):
            inside = [
                self.add(self.graph.call_function(operator.getitem, (node, number)), pair)
                for number, pair in enumerate(zip(one, two, strict=True))
            ]
            return inside if isinstance(one, list) else tuple(inside)
        if not isinstance(one, Tensor) or not one.is_floating_point() or one.ndim == 0:
            raise CannotPackError("the output of its frozen part is no tensor of numbers")
        rows, rest = divmod(len(one), self.fewer)
        if rest or len(two) != rows * self.more or one.shape[1:] != two.shape[1:]:
            raise CannotPackError("the output of its frozen part does not have a row per image")
        self.tensors.append(node)
        self.shapes.append((rows, *one.shape[1:]))
        return len(self.tensors) - 1

    def rebuild(self, place: Any, again: Sequence[fx.Node]) -> fx.Node:
        """A value by the positions of its tensors in `again`."""
        if isinstance(place, int):
            return again[place]
        return self.graph.call_function(type(place), (tuple(self.rebuild(each, again) for each in place),))
