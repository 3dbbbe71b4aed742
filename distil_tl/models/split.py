"""A network cut in two where its frozen part ends: a fixed function of the images, and what is trained on its result.

The cut is found in the graph of the network's own `forward` (torch.fx), so no model needs to be known by name.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

ALL_TRAINED = "what it trains takes the images themselves"
QUESTIONS = 32  # that a network's code may ask; each makes it be followed anew
TOLERANCE = 1e-4  # of the largest logit: what folding and reordering may change in float32


@dataclass(frozen=True)
class Split:
    """`suffix(prefix(x))` is the network's `forward(x)`, to rounding.

    Attributes:
        prefix: holds no parameter that is trained and draws nothing. BatchNorm is folded into copies of convolutions,
            everything else is the network's own.
        suffix: holds the network's own modules.
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
    for tracer in (_Layers, _FrozenBlocks, _Blocks):
        try:
            graph = _trace(tracer, module, images[:-1])
        except Exception as error:  # whatever the code of some model does with the stand-in for an image
            found = f"its code can't be followed ({type(error).__name__})"
            continue
        found = _cut(module, graph)
        if isinstance(found, Split):
            found = _compared(module, found, images)
        if isinstance(found, Split):
            return found
    return found


class _Layers(fx.Tracer):
    """Looks into everything but layers."""

    def __init__(self, answers: list[bool]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, (nn.Conv2d, nn.Linear, _NormBase))
        return is_layer or not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        for answer in self.answers:
            return answer
        raise _QuestionError(_up_to(self.graph, obj.node))


class _QuestionError(Exception):
    """The code asks for a value, say whether there are as many patches as positions, and goes on by it."""

    def __init__(self, asked: fx.Graph) -> None:
        super().__init__("a value is asked for")
        self.asked = asked


class _FrozenBlocks(_Layers):
    """Does not look into blocks of which nothing is trained, whatever their code does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        frozen = not any(p.requires_grad for p in m.parameters())
        return frozen or super().is_leaf_module(m, module_qualified_name)


class _Blocks(_Layers):
    """Nor into those of which all is trained."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        trained = {p.requires_grad for p in m.parameters()}
        return len(trained) < 2 or super().is_leaf_module(m, module_qualified_name)


def _trace(tracer: type[_Layers], module: nn.Module, images: Tensor) -> fx.Graph:
    """The graph of what `module` does with such images, whose questions are answered one after the other."""
    answers: list[bool] = []
    while True:
        try:
            return tracer(answers).trace(module)
        except _QuestionError as question:
            if len(answers) == QUESTIONS:
                raise
            with torch.no_grad(), undisturbed(module, images.device):
                answers.append(bool(fx.GraphModule(module, question.asked)(images)))


def _cut(module: nn.Module, graph: fx.Graph) -> Split | str:
    nodes = list(graph.nodes)
    first = next((i for i, node in enumerate(nodes) if _moves(module, node)), None)
    if first is None:
        return "nothing in it is trained"
    for where in reversed(nodes[:first]):
        if where.op in ("placeholder", "get_attr"):
            continue
        if _is_all_there_is(where, nodes[0], nodes[-1]):
            return Split(_prefix(module, graph, where), _suffix(module, graph, where))
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
    return where in _ancestors(output)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        for before in ahead.pop().all_input_nodes:
            if before not in found:
                found.add(before)
                ahead.append(before)
    return found


def _prefix(module: nn.Module, graph: fx.Graph, where: fx.Node) -> nn.Module:
    return _folded(fx.GraphModule(module, _up_to(graph, where)))


def _up_to(graph: fx.Graph, where: fx.Node) -> fx.Graph:
    """All that `where` needs, as a graph of its own."""
    copied: dict[fx.Node, fx.Node] = {}
    part = fx.Graph()
    kept = _ancestors(where) | {where}
    for node in graph.nodes:
        if node in kept or node.op == "placeholder":
            copied[node] = part.node_copy(node, copied.__getitem__)
    part.output(copied[where])
    return part


def _suffix(module: nn.Module, graph: fx.Graph, where: fx.Node) -> nn.Module:
    copied: dict[fx.Node, fx.Node] = {}
    suffix = fx.Graph()
    copied[where] = suffix.placeholder("features")
    needed = _needed(list(graph.nodes)[-1], where)
    for node in graph.nodes:
        if node in needed and node.op != "output":
            copied[node] = suffix.node_copy(node, copied.__getitem__)
    output = list(graph.nodes)[-1]
    suffix.output(fx.node.map_arg(output.args[0], copied.__getitem__))
    modules = [node for node in suffix.nodes if node.op == "call_module"]
    if len(modules) == len(suffix.nodes) - 2 and all(len(n.args) == 1 and not n.kwargs for n in modules):
        in_order = all(n.args[0] is n.prev for n in modules)
        if in_order and output.args[0] in copied:  # a chain of layers, such as a dropout and a head
            return nn.Sequential(*[module.get_submodule(str(n.target)) for n in modules])
    return fx.GraphModule(module, suffix)


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


def _folded(prefix: fx.GraphModule) -> fx.GraphModule:
    """Each BatchNorm right after a convolution becomes part of a copy of it. In place, but for the layers shared."""
    modules = dict(prefix.named_modules())
    for node in prefix.graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if norm is not None and node.args else None
        if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv = modules[str(before.target)]
        if not isinstance(conv, nn.Conv2d) or conv.training or _calls(prefix, before) > 1 or _calls(prefix, node) > 1:
            continue
        conv = copy.deepcopy(conv)
        assert norm.running_var is not None
        conv.weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.register_parameter("bias", bias)
        conv.requires_grad_(False)
        _replace(prefix, str(before.target), conv)
        # timm's norms hold the activation that follows.
        after = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        _replace(prefix, str(node.target), nn.Sequential(*after).eval())
    prefix.recompile()
    return prefix


def _calls(prefix: fx.GraphModule, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in prefix.graph.nodes)


def _replace(prefix: fx.GraphModule, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(prefix.get_submodule(owner), name, part)


@torch.no_grad()
def _compared(module: nn.Module, parts: Split, images: Tensor) -> Split | str:
    """The split, or the reason, if the two parts don't do what the whole does, or the first one not always the same."""
    with undisturbed(module, images.device):
        torch.manual_seed(1)
        features = parts.prefix(images)
        if not isinstance(features, Tensor) or len(features) != len(images):
            return "its frozen part gives more than a tensor"
        if not torch.equal(features, parts.prefix(images)):
            return "its frozen part does not give the same twice"
        for mode in (True, False):
            module.train(mode)
            torch.manual_seed(0)
            whole = module(images)
            torch.manual_seed(0)
            found = parts.suffix(features.clone())  # it may begin with an operation in place
            if not isinstance(whole, Tensor) or not isinstance(found, Tensor) or found.shape != whole.shape:
                return "its output is not one tensor of logits"
            if (found - whole).abs().max() > TOLERANCE * whole.abs().max().clamp(min=1e-3):
                return "its two parts don't give what the whole does"
    return parts


@contextlib.contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the network, in whatever mode, without moving its statistics or the random numbers."""
    modes = [(m, m.training) for m in module.modules()]
    moving = [m for m in module.modules() if isinstance(m, _NormBase) and m.training]
    buffers = [(buffer, buffer.clone()) for m in moving for buffer in m.buffers(recurse=False)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for part, mode in modes:
        part.training = mode
    for buffer, value in buffers:
        buffer.copy_(value)
