"""Where the feature maps of a network halve: its stages, found in one pass of an image."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.readout_parts import CannotReadOutError
from distil_tl.models.traced_pass import run_traced


@dataclass(frozen=True)
class StageEnd:
    """The last layer or block whose feature maps or tokens have a resolution.

    Attributes:
        path: of it.
        channels: of the maps.
        places: the dimensions of the maps that are not channels.
    """

    path: str
    channels: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Walk:
    """The layers and blocks of a network, in the order in which they return for an image.

    Attributes:
        returned: path and shape of the output of each; None for what is no tensor.
    """

    returned: Sequence[tuple[str, tuple[int, ...] | None]]

    def before(self, path: str) -> Walk:
        """Those before a layer."""
        return Walk(self.returned[: [each for each, _ in self.returned].index(path)])

    def stage_ends(self, candidates: Collection[str]) -> list[StageEnd]:
        """The ends of all stages, in order: of `candidates`."""
        ends = dict[int, StageEnd]()
        for path, shape in self.returned:
            if path not in candidates or shape is None or len(shape) not in (3, 4):
                continue
            last = len(shape) == 3 or shape[1] == shape[2] != shape[3]  # channels come last
            places = tuple(range(1, len(shape) - 1)) if last else (2, 3)
            locations = math.prod(shape[place] for place in places)
            if locations <= min(ends, default=locations):
                ends[locations] = StageEnd(path, shape[-1] if last else shape[1], places)
        return list(ends.values())

    def before_head(self, module: nn.Module, head: str, inputs: int) -> tuple[str, int]:
        """The last layer before the head, other than a dropout, with its dimension of `inputs` channels.

        Raises:
            CannotReadOutError: its output is something else than what the head gets, such as feature maps.
        """
        paths = [path for path, _ in self.returned]
        for path, shape in reversed(self.returned[: paths.index(head)]):
            part = module.get_submodule(path)
            if isinstance(part, _DropoutNd) or any(True for _ in part.children()):
                continue
            if shape in ((1, inputs), (1, inputs, 1, 1)) and paths.count(path) == 1:
                return path, 1
            if shape == (1, 1, 1, inputs) and paths.count(path) == 1:
                return path, 3
            break
        raise CannotReadOutError("no layer of it gives what its head gets")


def walk(module: nn.Module, size: int) -> Walk:
    """Run `module` on an image. Raises CannotReadOutError if it fails."""
    device, returned = next(module.parameters()).device, list[tuple[str, tuple[int, ...] | None]]()

    def ended(path: str, _: Any, output: Any) -> None:
        returned.append((path, tuple(output.shape) if isinstance(output, Tensor) else None))

    run_traced(module, torch.zeros(1, 3, size, size, device=device), ended)
    return Walk(returned)


def stages_before_last(passed: Walk, module: nn.Module, groups: Iterable[LayerGroup], count: int) -> list[StageEnd]:
    """The ends of the last `count` stages before the last one.

    Raises:
        CannotReadOutError: there are fewer.
    """
    # VGG and AlexNet are only sequences of layers, of which those without parameters are in no group.
    candidates = blocks_of(module, groups) or [path for path, _ in passed.returned]
    ends = passed.stage_ends(candidates)
    if len(ends) <= count:
        raise CannotReadOutError(f"it has no {count + 1} stages of feature maps")
    return ends[-count - 1 : -1]


def blocks_of(module: nn.Module, groups: Iterable[LayerGroup]) -> list[str]:
    """Paths of the blocks of layer groups: their modules, and the children of those that are only sequences."""
    modules, found = dict(module.named_modules()), []
    for path in (prefix for group in groups for prefix in group.prefixes if prefix in modules):
        children = modules[path].named_children() if type(modules[path]) is nn.Sequential else ()
        within = [f"{path}.{name}" for name, _ in children]
        found += [each for each in (*within, path) if any(True for _ in modules[each].children())]
    return found
