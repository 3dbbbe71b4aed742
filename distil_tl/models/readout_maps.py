"""Read-outs of feature maps: averages, maxima, and the averages of earlier stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distil_tl.models.head import replace_head
from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.maps_walk import stages_before_last, walk
from distil_tl.models.readout_parts import CannotReadOutError, apply_to_parts, inputs_of
from distil_tl.models.taps import GivesAverage, JoinsToOutput, Taps, become


class AverageAndMax(nn.Module):
    """Feature maps to the average and the maximum of each channel, one after the other.

    Args:
        channels: the dimension of the channels.
        flatten: whether the two other dimensions are left out.
    """

    def __init__(self, channels: int, flatten: bool) -> None:
        super().__init__()
        self.channels, self.flatten = channels, flatten
        self.places = (2, 3) if channels == 1 else (1, 2)

    def forward(self, maps: Tensor) -> Tensor:
        average = maps.mean(self.places, keepdim=not self.flatten)
        largest = maps.amax(self.places, keepdim=not self.flatten)
        return torch.cat([average, largest], 1 if self.flatten else self.channels)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, flatten={self.flatten}"


def read_maps(
    module: nn.Module, head: str, parts: Sequence[str], groups: Iterable[LayerGroup], num_classes: int, size: int
) -> dict[str, int]:
    """Have the head get these parts, of `MAPS_ORDER`. Returns their widths.

    Args:
        groups: the layer groups before the head.
        size: of the images in pixels, for a pass that finds the stages.

    Raises:
        CannotReadOutError: the network lacks one of them; it is as it was.
    """
    own, pool = inputs_of(module, head), _average_pool(module)
    widths = {"average": own, "maximum": own}
    earlier = [part for part in parts if part not in widths]
    passed, taps = walk(module, size), Taps()
    path, channels = passed.before_head(module, head, own)
    ends = stages_before_last(passed.before(pool), module, groups, len(earlier)) if earlier else []
    if "maximum" in parts:
        _pool_average_and_max(module, pool, head)
        replace_head(module, head, num_classes, 2 * own)
    for place, (part, end) in enumerate(zip(earlier, ends, strict=True)):
        become(module.get_submodule(end.path), GivesAverage, taps=taps, place=place, places=end.places)
        widths[part] = end.channels
    if earlier:
        become(module.get_submodule(path), JoinsToOutput, taps=taps, count=len(earlier), channels=channels)
    return widths


def has_average_pool(module: nn.Module) -> bool:
    """Whether a layer averages feature maps."""
    return any(_is_average(part) for part in module.modules())


def _average_pool(module: nn.Module) -> str:
    """The path of the last average pooling."""
    pools: list[str] = [path for path, part in module.named_modules() if _is_average(part)]
    if not pools:
        raise CannotReadOutError("no layer of it averages feature maps")
    return pools[-1]


def _is_average(part: nn.Module) -> bool:
    """Whether a layer averages each feature map to one value: torch's, or timm's for any order of dimensions."""
    is_torch = isinstance(part, nn.AdaptiveAvgPool2d) and part.output_size in (1, (1, 1))
    return is_torch or type(part).__name__ == "FastAdaptiveAvgPool"


def _pool_average_and_max(module: nn.Module, path: str, head: str) -> None:
    """Replace the average pooling, and have the layers with parameters between it and the head compute each half."""
    pool: Any = module.get_submodule(path)
    last = getattr(pool, "dim", (2, 3)) == (1, 2)  # channels come last
    module.set_submodule(path, AverageAndMax(3 if last else 1, bool(getattr(pool, "flatten", False))))
    paths = [path for path, _ in module.named_modules()]
    after = paths[paths.index(path) + 1 : paths.index(head)]
    with_parameters = [p for p in after if any(True for _ in module.get_submodule(p).parameters(recurse=False))]
    apply_to_parts(module, with_parameters, 2)
