"""Cutting a network in two where its frozen part ends: fixed features of the images, and what is trained on them.

The cut is found in the graph of the network's own `forward`, without rules for single models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from distil_tl.models.graph.equivalence import (
    TOLERANCE,
    NotEquivalentError,
    check_equivalent,
    in_full_float32,
    preserve_state,
    without_report,
)
from distil_tl.models.graph.fold_batchnorm import fold_at_each_call, fold_frozen, has_folded_batchnorm
from distil_tl.models.graph.known_shapes import batch_size, trace_with_shapes
from distil_tl.models.graph.packed_features import pack, pack_frozen_values
from distil_tl.models.graph.trace import (
    FrozenBlockTracer,
    LayerTracer,
    UniformBlockTracer,
    Whole,
    ancestors,
    graph_up_to,
    trace,
)

NO_FROZEN_PREFIX = "its trained part uses the images directly"


class CannotCutError(Exception):
    """The network cannot be cut; the message is the reason."""


@dataclass(frozen=True)
class CutNetwork:
    """A network in two parts: `suffix(prefix(x))` equals the network's `forward(x)` up to rounding.

    Attributes:
        prefix: images to features, deterministic and without trained parameters. BatchNorm is folded into copies of
            convolutions; all other modules are the network's own.
        suffix: features to logits, made of the network's own modules. BatchNorm is folded at each call where possible.
        packed: the features are several tensors in one, a row per image: not pooled, although they have two dimensions.
    """

    prefix: nn.Module
    suffix: nn.Module
    packed: bool = False


def cut_frozen_prefix(module: nn.Module, images: Tensor) -> CutNetwork:
    """Cut `module`, whose freezing is applied, as late as its trained part allows.

    Args:
        images: normalised [N, 3, H, W], at least two, to compare both parts with the whole. Conditions in the code
            that depend on their size are fixed for it.

    Raises:
        CannotCutError: nothing is frozen or trained, the code cannot be traced, or the parts differ from the whole.
    """
    if all(p.requires_grad for p in module.parameters()):  # saves time in most long stages
        raise CannotCutError(NO_FROZEN_PREFIX)
    whole = Whole(module)
    reason = ""
    for tracer in (LayerTracer, FrozenBlockTracer, UniformBlockTracer):
        try:
            # One image fewer than in the comparison: code that depends on the batch size then fails it.
            graph = trace(tracer, whole, images[:-1])
        except Exception as error:  # the model's code may raise anything when it is called with a proxy
            reason = f"its code can't be traced ({type(error).__name__})"
            continue
        try:
            return _cut(whole, graph, _last_frozen_node(whole, graph), images)
        except CannotCutError as error:
            reason = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a graph need not do what the code does
            reason = f"its parts can't be run ({type(error).__name__})"
    cut = _cut_with_shapes(whole, images)
    if cut is None:
        raise CannotCutError(reason)
    return cut


def _cut_with_shapes(whole: Whole, images: Tensor) -> CutNetwork | None:
    """The network cut with known shapes, after all that is frozen, or None; its features may be several tensors in one.

    Only for networks that can't be cut without, as a cut at another point makes other features.
    """
    for blocks in (LayerTracer, FrozenBlockTracer, UniformBlockTracer):
        try:
            graph, values = trace_with_shapes(blocks, whole, images)
            varying = {node for node in graph.nodes if _varies(whole, node)}
            packed, node = pack_frozen_values(graph, values, varying)
            cut = replace(_cut(whole, packed, node, images), packed=node.target is pack)
            _check_rows(cut.prefix, whole, images)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # as in `cut_frozen_prefix`, which knows the reason
            continue
        return cut
    return None


def _cut(module: nn.Module, graph: fx.Graph, node: fx.Node, images: Tensor) -> CutNetwork:
    """The network cut after `node`, if its parts pass the check."""
    prefix = fold_frozen(fx.GraphModule(module, graph_up_to(graph, node)))
    cut = CutNetwork(prefix, _suffix(module, graph, node, fold=True))
    try:
        _check(cut, module, images)
    except CannotCutError:
        if not has_folded_batchnorm(cut.suffix):
            raise
        cut = CutNetwork(prefix, _suffix(module, graph, node, fold=False))
        _check(cut, module, images)
    return cut


def _last_frozen_node(module: nn.Module, graph: fx.Graph) -> fx.Node:
    """The last node before the trained part that is on every path from the images to the result."""
    nodes = list(graph.nodes)
    first = next((i for i, node in enumerate(nodes) if _varies(module, node)), None)
    if first is None:
        raise CannotCutError("nothing in it is trained")
    node: fx.Node
    for node in reversed(nodes[:first]):
        if node.op not in ("placeholder", "get_attr") and _is_on_every_path(node, nodes[0], nodes[-1]):
            return node
    raise CannotCutError(NO_FROZEN_PREFIX)


def _varies(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node's result may differ at the next call: it is trained, random, or updates statistics."""
    if node.op == "get_attr":
        return _attribute(module, str(node.target)).requires_grad
    if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
        return True in (*node.args, *node.kwargs.values())  # its argument `training`
    if node.op != "call_module":
        return False
    part = module.get_submodule(str(node.target))
    trained = any(p.requires_grad for p in part.parameters())
    return trained or any(m.training and _varies_in_training(m) for m in part.modules())


def _varies_in_training(part: nn.Module) -> bool:
    if isinstance(part, _DropoutNd):
        return part.p > 0
    return isinstance(part, _NormBase) or type(part).__name__ in ("StochasticDepth", "DropPath", "DropBlock2d")


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value


def _is_on_every_path(node: fx.Node, images: fx.Node, output: fx.Node) -> bool:
    """Whether the output depends on `node`, and on the images only through it."""
    return images not in _after(node, output) and node in ancestors(output)


def _after(node: fx.Node, output: fx.Node) -> set[fx.Node]:
    """The nodes that the output depends on, without `node` and those that only `node` depends on."""
    visited: set[fx.Node] = set()
    pending = [output]
    while pending:
        other = pending.pop()
        if other is not node and other not in visited:
            visited.add(other)
            pending.extend(other.all_input_nodes if other.target is not batch_size else ())
    return visited


def _suffix(module: nn.Module, graph: fx.Graph, node: fx.Node, *, fold: bool) -> nn.Module:
    """The network from the result of `node` to the output; a plain Sequential if it is a chain of layers."""
    output = list(graph.nodes)[-1]
    part = fx.Graph()
    copies = {node: part.placeholder("features")}
    kept = _after(node, output)
    for other in graph.nodes:
        if other in kept and other.target is batch_size:
            copies[other] = part.call_function(batch_size, (copies[node],))
        elif other in kept and other.op != "output":
            copies[other] = part.node_copy(other, copies.__getitem__)
    part.output(fx.node.map_arg(output.args[0], copies.__getitem__))
    suffix = fx.GraphModule(module, part)
    if fold:
        fold_at_each_call(suffix)
    calls = [n for n in part.nodes if n.op == "call_module"]
    if len(calls) == len(part.nodes) - 2 and all(len(n.args) == 1 and not n.kwargs for n in calls):
        in_order = all(n.args[0] is n.prev for n in calls)
        if in_order and output.args[0] in copies:  # a chain of layers, such as a dropout and a head
            layers = [suffix.get_submodule(str(n.target)) for n in calls]
            return nn.Sequential(*[layer for layer in layers if not isinstance(layer, nn.Identity)])
    return suffix


@torch.no_grad()
@in_full_float32()
def _check(cut: CutNetwork, module: nn.Module, images: Tensor) -> None:
    """Compare both parts with the whole.

    Raises:
        CannotCutError: they differ from the whole, or the prefix differs between two calls.
    """
    prefix, suffix = without_report(cut.prefix), without_report(cut.suffix)
    with preserve_state(module, images.device):
        torch.manual_seed(1)
        features = prefix(images)
        if not isinstance(features, Tensor) or len(features) != len(images):
            raise CannotCutError("the output of its frozen part is not one tensor with a row per image")
        if not torch.equal(features, prefix(images)):
            raise CannotCutError("its frozen part gives different results in two calls")
    try:
        # A copy of the features, as the suffix may begin with an in-place operation.
        check_equivalent(lambda _: suffix(features.clone()), module, images, called="its two parts")
    except NotEquivalentError as error:
        raise CannotCutError(str(error)) from error


@torch.no_grad()
@in_full_float32()
def _check_rows(prefix: nn.Module, module: nn.Module, images: Tensor) -> None:
    """Check that each row of the features depends on its image only.

    Raises:
        CannotCutError: other rows change with the order of the images.
    """
    with preserve_state(module, images.device):
        features, reversed_ones = prefix(images), prefix(images.flip(0)).flip(0)
    if not (features - reversed_ones).abs().max() <= TOLERANCE * features.abs().max().clamp(min=1e-3):
        raise CannotCutError("the rows of its features depend on several images")
