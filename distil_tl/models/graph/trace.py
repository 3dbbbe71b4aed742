"""The graph of what a network's own `forward` does (torch.fx), so that no model needs to be known by name."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from distil_tl.models.graph.equivalence import undisturbed

QUESTIONS = 32  # that a network's code may ask; each makes it be followed anew


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
