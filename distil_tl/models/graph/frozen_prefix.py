"""A network cut in two where its frozen part ends: a fixed function of the images, and what is trained on its result.

The cut is found in the graph of the network's own `forward`, so no model needs to be known by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from distil_tl.models.graph.equivalence import fault_of, in_full_float32, undisturbed
from distil_tl.models.graph.fold_batchnorm import fold_at_each_call, fold_for_good, folds
from distil_tl.models.graph.trace import Blocks, FrozenBlocks, Layers, ancestors, trace, up_to

ALL_TRAINED = "what it trains takes the images themselves"


@dataclass(frozen=True)
class Split:
    """`suffix(prefix(x))` is the network's `forward(x)`, to rounding.

    Attributes:
        prefix: holds no parameter that is trained and draws nothing. BatchNorm is folded into copies of convolutions,
            everything else is the network's own.
        suffix: holds the network's own modules. BatchNorm is folded at each call where it can be.
    """

    prefix: nn.Module
    suffix: nn.Module


def split(module: nn.Module, images: Tensor) -> Split | str:
    """Cut `module`, whose freezing is applied, as late as its trained part allows; or the reason why it can't be.

    Args:
        images: normalised [N, 3, H, W], at least two, to try both parts on. What depends on their size is settled.
    """
    if all(p.requires_grad for p in module.parameters()):  # most stages that are long: spare them the search
        return ALL_TRAINED
    module = nn.Sequential(module)  # which calls it with images alone, whatever else it could take
    found: Split | str = "its code can't be followed"
    for tracer in (Layers, FrozenBlocks, Blocks):
        try:
            graph = trace(tracer, module, images[:-1])
        except Exception as error:  # whatever the code of some model does with the stand-in for an image
            found = f"its code can't be followed ({type(error).__name__})"
            continue
        for folded in (True, False):
            cut = _cut(module, graph, folded)
            found = _compared(module, cut, images) if isinstance(cut, Split) else cut
            if isinstance(found, Split):
                return found
            if isinstance(cut, str) or not folds(cut.suffix):
                break
    return found


def _cut(module: nn.Module, graph: fx.Graph, folded: bool) -> Split | str:
    nodes = list(graph.nodes)
    first = next((i for i, node in enumerate(nodes) if _moves(module, node)), None)
    if first is None:
        return "nothing in it is trained"
    for where in reversed(nodes[:first]):
        if where.op in ("placeholder", "get_attr"):
            continue
        if _is_all_there_is(where, nodes[0], nodes[-1]):
            return Split(_prefix(module, graph, where), _suffix(module, graph, where, folded))
    return ALL_TRAINED


def _moves(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node's result may be another the next time: it is trained, draws, or counts."""
    if node.op == "get_attr":
        return _attribute(module, str(node.target)).requires_grad
    if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
        return True in (*node.args, *node.kwargs.values())  # its `training`
    if node.op != "call_module":
        return False
    part = module.get_submodule(str(node.target))
    return any(p.requires_grad for p in part.parameters()) or any(m.training and _draws(m) for m in part.modules())


def _draws(part: nn.Module) -> bool:
    if isinstance(part, _DropoutNd):
        return part.p > 0
    return isinstance(part, _NormBase) or type(part).__name__ in ("StochasticDepth", "DropPath", "DropBlock2d")


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), name)
    return found


def _is_all_there_is(where: fx.Node, images: fx.Node, output: fx.Node) -> bool:
    """Whether everything after `where` needs the images through it alone."""
    seen, ahead = {where}, [output]
    while ahead:
        node = ahead.pop()
        if node is images:
            return False
        if node not in seen:
            seen.add(node)
            ahead.extend(node.all_input_nodes)
    return where in ancestors(output)


def _prefix(module: nn.Module, graph: fx.Graph, where: fx.Node) -> nn.Module:
    return fold_for_good(fx.GraphModule(module, up_to(graph, where)))


def _suffix(module: nn.Module, graph: fx.Graph, where: fx.Node, folded: bool) -> nn.Module:
    copied: dict[fx.Node, fx.Node] = {}
    suffix = fx.Graph()
    copied[where] = suffix.placeholder("features")
    needed = _needed(list(graph.nodes)[-1], where)
    for node in graph.nodes:
        if node in needed and node.op != "output":
            copied[node] = suffix.node_copy(node, copied.__getitem__)
    output = list(graph.nodes)[-1]
    suffix.output(fx.node.map_arg(output.args[0], copied.__getitem__))
    found = fx.GraphModule(module, suffix)
    if folded:
        fold_at_each_call(found)
    modules = [node for node in suffix.nodes if node.op == "call_module"]
    if len(modules) == len(suffix.nodes) - 2 and all(len(n.args) == 1 and not n.kwargs for n in modules):
        in_order = all(n.args[0] is n.prev for n in modules)
        if in_order and output.args[0] in copied:  # a chain of layers, such as a dropout and a head
            layers = [found.get_submodule(str(n.target)) for n in modules]
            return nn.Sequential(*[layer for layer in layers if not isinstance(layer, nn.Identity)])
    return found


def _needed(output: fx.Node, where: fx.Node) -> set[fx.Node]:
    """What is computed from the result of `where` on, and the constants that it takes."""
    found: set[fx.Node] = set()
    ahead = [output]
    while ahead:
        node = ahead.pop()
        if node is not where and node not in found:
            found.add(node)
            ahead.extend(node.all_input_nodes)
    return found


@torch.no_grad()
@in_full_float32()
def _compared(module: nn.Module, parts: Split, images: Tensor) -> Split | str:
    """The split, or the reason, if the two parts don't do what the whole does, or the first one not always the same."""
    with undisturbed(module, images.device):
        torch.manual_seed(1)
        features = parts.prefix(images)
        if not isinstance(features, Tensor) or len(features) != len(images):
            return "its frozen part gives more than a tensor"
        if not torch.equal(features, parts.prefix(images)):
            return "its frozen part does not give the same twice"
    # It may begin with an operation in place.
    return fault_of(lambda _: parts.suffix(features.clone()), module, images, called="its two parts") or parts
