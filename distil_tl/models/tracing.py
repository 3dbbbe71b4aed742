"""The graph of what a network's own `forward` does (torch.fx), so that no model needs to be known by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

QUESTIONS = 32  # that a network's code may ask; each makes it be followed anew
TOLERANCE = 1e-4  # of the largest logit: what folding and reordering may change in float32


class Layers(fx.Tracer):
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
        raise QuestionError(up_to(self.graph, obj.node))


class QuestionError(Exception):
    """The code asks for a value, say whether there are as many patches as positions, and goes on by it."""

    def __init__(self, asked: fx.Graph) -> None:
        super().__init__("a value is asked for")
        self.asked = asked


class FrozenBlocks(Layers):
    """Does not look into blocks of which nothing is trained, whatever their code does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        frozen = not any(p.requires_grad for p in m.parameters())
        return frozen or super().is_leaf_module(m, module_qualified_name)


class Blocks(Layers):
    """Nor into those of which all is trained."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        trained = {p.requires_grad for p in m.parameters()}
        return len(trained) < 2 or super().is_leaf_module(m, module_qualified_name)


def trace(tracer: type[Layers], module: nn.Module, images: Tensor) -> fx.Graph:
    """The graph of what `module` does with such images, whose questions are answered one after the other."""
    answers: list[bool] = []
    while True:
        try:
            return tracer(answers).trace(module)
        except QuestionError as question:
            if len(answers) == QUESTIONS:
                raise
            with torch.no_grad(), undisturbed(module, images.device):
                answers.append(bool(fx.GraphModule(module, question.asked)(images)))


def ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        for before in ahead.pop().all_input_nodes:
            if before not in found:
                found.add(before)
                ahead.append(before)
    return found


def up_to(graph: fx.Graph, where: fx.Node) -> fx.Graph:
    """All that `where` needs, as a graph of its own."""
    copied: dict[fx.Node, fx.Node] = {}
    part = fx.Graph()
    kept = ancestors(where) | {where}
    for node in graph.nodes:
        if node in kept or node.op == "placeholder":
            copied[node] = part.node_copy(node, copied.__getitem__)
    part.output(copied[where])
    return part


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


@contextlib.contextmanager
def in_full_float32() -> Iterator[None]:
    """CUDA computes convolutions in TF32 otherwise, whose rounding is coarser than what is to be compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
@in_full_float32()
def difference(module: nn.Module, other: Callable[[Tensor], Tensor], images: Tensor) -> str | None:
    """How `other`, which holds the modules of `module`, does not do what that does, in training or in evaluation."""
    with undisturbed(module, images.device):
        for mode in (True, False):
            module.train(mode)
            torch.manual_seed(0)
            whole = module(images)
            torch.manual_seed(0)
            found = other(images)
            if not isinstance(whole, Tensor) or not isinstance(found, Tensor) or found.shape != whole.shape:
                return "its output is not one tensor of logits"
            if (found - whole).abs().max() > TOLERANCE * whole.abs().max().clamp(min=1e-3):
                return "its two parts don't give what the whole does"
    return None
