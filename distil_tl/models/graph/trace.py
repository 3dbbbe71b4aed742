"""Tracing a network's own `forward` into a torch.fx graph, without rules for single models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from distil_tl.models.fitted_heads import FittedHead
from distil_tl.models.graph.equivalence import preserve_state, without_report

MAX_CONDITIONS = 32  # conditions on values that a network's code may evaluate; each one starts the trace again


class TracedInto(nn.Module):
    """A layer that a graph must contain the operations of, as values pass beside its input and output."""


class CalledLater(nn.Module):
    """A layer that is called twice in a pass, the first time without its parameters. A graph lacks that call."""

    @property
    def is_first_call(self) -> bool:
        """Whether a call now is the first one."""
        raise NotImplementedError


def _is_traced_into(part: nn.Module) -> bool:
    return any(
        isinstance(each, TracedInto) or (isinstance(each, CalledLater) and each is not part) for each in part.modules()
    )


def is_skipped(part: nn.Module) -> bool:
    """Whether a call of a layer is left out of a graph."""
    return isinstance(part, CalledLater) and part.is_first_call


class LayerTracer(fx.Tracer):
    """Traces into every module but layers: convolutions, linear layers, norms, heads, and modules without children.

    Args:
        outcomes: of the conditions on values that the code evaluates, in order.
    """

    def __init__(self, outcomes: list[bool]) -> None:
        super().__init__()
        self.outcomes = iter(outcomes)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_traced_into(m):
            return False
        is_layer = isinstance(m, (nn.Conv2d, nn.Linear, _NormBase, FittedHead))
        return is_layer or not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if is_skipped(m) else super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        for outcome in self.outcomes:
            return outcome
        raise UnknownConditionError(graph_up_to(self.graph, obj.node))


class UnknownConditionError(Exception):
    """The code branches on a value, such as whether there are as many patches as position embeddings.

    Attributes:
        condition: a graph that computes the value.
    """

    def __init__(self, condition: fx.Graph) -> None:
        super().__init__("the code branches on a value")
        self.condition = condition


class FrozenBlockTracer(LayerTracer):
    """Does not trace into blocks without trained parameters, so their code may do anything."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        frozen = not any(p.requires_grad for p in m.parameters())
        return (frozen and not _is_traced_into(m)) or super().is_leaf_module(m, module_qualified_name)


class UniformBlockTracer(LayerTracer):
    """Does not trace into blocks whose parameters are all frozen or all trained."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        trained = {p.requires_grad for p in m.parameters()}
        uniform = len(trained) < 2 and not _is_traced_into(m)
        return uniform or super().is_leaf_module(m, module_qualified_name)


class Whole(nn.Sequential):
    """A network that is called with images only, even if its `forward` has more arguments.

    Its other children are the dropouts that `trace` adds, which its `forward` does not call.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)

    def forward(self, input):  # type: ignore[no-untyped-def]  # as in nn.Sequential: it is in the keys of caches
        return self[0](input)


def trace(tracer: type[LayerTracer], module: nn.Module, images: Tensor) -> fx.Graph:
    """The graph of `module`, called with images like these.

    A condition on a value is evaluated with `images`, and its outcome becomes fixed in the graph. Whether a network
    trains does not become fixed: for a dropout that it calls as a function, `module` gets a module.
    """
    outcomes: list[bool] = []
    while True:
        try:
            return use_dropout_modules(module, tracer(outcomes).trace(module))
        except UnknownConditionError as error:
            if len(outcomes) == MAX_CONDITIONS:
                raise
            with torch.no_grad(), preserve_state(module, images.device):
                outcomes.append(bool(without_report(fx.GraphModule(module, error.condition))(images)))


def use_dropout_modules(module: nn.Module, graph: fx.Graph) -> fx.Graph:
    """Replace each call of the function dropout that is active by a new module of `module`, which follows its mode.

    timm's networks call it before their head. A call with `training=False` stays: it is in a frozen part.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.dropout:
            continue
        given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)
        if given.get("training", True) is not True:
            continue
        name = f"{node.name}_module"
        module.add_module(name, nn.Dropout(given.get("p", 0.5), bool(given.get("inplace", False))))
        with graph.inserting_before(node):
            replacement = graph.call_module(name, (given["input"],))
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    return graph


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that `node` depends on."""
    visited: set[fx.Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in visited:
                visited.add(source)
                pending.append(source)
    return visited


def graph_up_to(graph: fx.Graph, node: fx.Node) -> fx.Graph:
    """A separate graph that computes `node`."""
    copies: dict[fx.Node, fx.Node] = {}
    part = fx.Graph()
    kept = ancestors(node) | {node}
    for other in graph.nodes:
        if other in kept or other.op == "placeholder":
            copies[other] = part.node_copy(other, copies.__getitem__)
    part.output(copies[node])
    return part
