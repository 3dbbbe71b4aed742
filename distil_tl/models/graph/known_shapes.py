"""Tracing with shapes that are numbers, for code that calculates with them, branches on them or loops over them.

Sizes become fixed in the graph, but not the number of images: where the code asks for it, the graph asks its input.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from distil_tl.models.graph.equivalence import preserve_state
from distil_tl.models.graph.trace import LayerTracer, is_skipped, use_dropout_modules

Values = tuple[Any, Any]  # what a node computes for the one and for the other number of images
_FACTS = ("dtype", "device", "layout", "ndim", "is_cuda", "itemsize")  # of a tensor, that no size of it changes
_CONSTANTS = (int, float, str, torch.dtype, torch.device, torch.layout, type(None))


def batch_size(images: Tensor) -> int:
    """The number of images or, in the second part of a network that is cut, of features."""
    return len(images)


def trace_with_shapes(
    blocks: type[LayerTracer], module: nn.Module, images: Tensor
) -> tuple[fx.Graph, dict[fx.Node, Values]]:
    """The graph of `module`, called with images like these, and what its nodes compute for two numbers of images.

    Args:
        blocks: says which modules are not traced into.
        images: at least two.
    """
    tracer = ShapeTracer(blocks([]), images)
    with torch.no_grad(), preserve_state(module, images.device):
        graph = tracer.trace(module)
    return use_dropout_modules(module, graph), tracer.values


class ShapeTracer(fx.Tracer):
    """Computes each node for two numbers of images. A value that is no tensor, and equal for both, is a constant.

    Args:
        blocks: its `is_leaf_module` says which modules are not traced into.
        images: given without the last one, and with it.
    """

    def __init__(self, blocks: LayerTracer, images: Tensor) -> None:
        super().__init__()
        self.blocks, self.images = blocks, (images[:-1], images)
        self.values: dict[fx.Node, Values] = {}
        self.computes = False  # so that the modules that compute a value are not traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.blocks.is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        skipped = self.computes or is_skipped(m)
        return forward(*args, **kwargs) if skipped else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computes else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ShapeProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **options: Any) -> Any:
        made = super().create_proxy(kind, target, args, kwargs, *others, **options)
        one, two = self.values_of(made.node)
        if all(_is_constant(self.values_of(node)[0]) for node in made.node.all_input_nodes):
            same = (target is operator.eq and one is two is True) or (target is operator.ne and one is two is False)
            return one if same else made  # of two functions of the number of images; others may agree by chance
        return self.known(one, two) if _is_constant(one) else made

    def known(self, one: Any, two: Any) -> Any:
        """A value that is no tensor: a constant, or a function of the number of images."""
        if isinstance(one, (tuple, list)):
            return tuple(self.known(*pair) for pair in zip(one, two, strict=True))
        if one == two:
            return one
        first, second = map(len, self.images)
        if not isinstance(one, int) or one % first or one * second != two * first:
            raise fx.proxy.TraceError("a value depends on the number of images")
        return self.number if one == first else self.number * (one // first)

    @functools.cached_property
    def number(self) -> Any:
        """The number of images."""
        images = next(node for node in self.graph.nodes if node.op == "placeholder")
        return super().create_proxy("call_function", batch_size, (fx.Proxy(images, self),), {})

    def values_of(self, node: fx.Node) -> Values:
        if node not in self.values:
            before, self.computes = self.computes, True
            try:
                self.values[node] = (self._compute(node, 0), self._compute(node, 1))
            finally:
                self.computes = before
        return self.values[node]

    def _compute(self, node: fx.Node, which: int) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda other: self.values_of(other)[which])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda other: self.values_of(other)[which])
        if node.op == "placeholder":
            return self.images[which].clone()  # the code may change it in place
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise fx.proxy.TraceError("the code branches on a value, or on the number of images")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return (obj[position] for position in range(len(obj)))  # type: ignore[index]


class ShapeProxy(fx.Proxy):
    """A value whose shape the code may ask for."""

    tracer: ShapeTracer

    def __getattr__(self, k: str) -> Any:
        if k == "shape" or k in _FACTS:
            one, two = (getattr(value, k) for value in self.tracer.values_of(self.node))
            return self.tracer.known(one, two)
        return super().__getattr__(k)

    def __len__(self) -> int:
        one, two = map(len, self.tracer.values_of(self.node))
        if one != two:
            raise fx.proxy.TraceError("the code asks for the number of images")
        return one


def _is_constant(value: Any) -> bool:
    """Whether it is no tensor, and holds none."""
    if isinstance(value, (tuple, list)):
        return all(_is_constant(each) for each in value)
    return isinstance(value, _CONSTANTS)
