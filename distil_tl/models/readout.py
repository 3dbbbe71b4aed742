"""Read-outs: what of the last feature maps or tokens of a network its head gets.

The layers of the network keep their names, so its weights are loaded and saved as before. Only its head has another
width, and where the pooling is followed by layers of its own, such as a norm, they are applied to each part.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from distil_tl.models.head import replace_head
from distil_tl.models.size_trial import failure_at


class CannotReadOutError(Exception):
    """A network has no such read-out; the message is the reason."""


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


class TokenReadout(nn.Module):
    """Tokens [N, T, C] to the class token, the mean of the patches, or both, one after the other.

    Args:
        readout: token, mean or token_mean.
        others: tokens before those of the patches, the class token first.
    """

    def __init__(self, readout: str, others: int) -> None:
        super().__init__()
        self.readout, self.others = readout, others

    def forward(self, tokens: Tensor) -> Tensor:
        parts = []
        if self.readout != "mean":
            parts.append(tokens[:, 0])
        if self.readout != "token":
            parts.append(tokens[:, self.others :].mean(1))
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        return f"{self.readout}, others={self.others}"


def set_readout(
    module: nn.Module, heads: tuple[str, ...], readout: str, num_classes: int, size: int
) -> tuple[str, ...]:
    """Give `module` a read-out, in place, and a head of its width. Returns the paths of layers that it has no more.

    Args:
        readout: one of `READOUTS`, but not pooled.
        size: of the images in pixels, for a trial.

    Raises:
        CannotReadOutError: the network has no such read-out.
    """
    if len(heads) != 1:
        raise CannotReadOutError("it has two heads")
    removed: tuple[str, ...] = ()
    if readout == "avg_max":
        between = _pool_average_and_max(module, heads[0])
    else:
        between, removed = _pool_tokens(module, readout)
    parts = 2 if readout in ("avg_max", "token_mean") else 1
    for path in between if parts > 1 else ():
        layer: Any = module.get_submodule(path)
        kind: Any = type(layer)
        layer.__class__ = _on_each_part(kind, parts)
    replace_head(module, heads[0], num_classes, parts)
    if reason := failure_at(module, size):
        raise CannotReadOutError(f"its layers do not take it ({reason})")
    return removed


@functools.cache
def _on_each_part(kind: Any, parts: int) -> Any:
    """The same layer for vectors or maps that hold several parts, of which it computes each one."""

    def forward(self: nn.Module, values: Tensor) -> Tensor:
        return torch.cat([kind.forward(self, part) for part in values.chunk(parts, 1)], 1)

    return type(f"{kind.__name__}OnParts", (kind,), {"forward": forward, "__module__": kind.__module__})


def _pool_average_and_max(module: nn.Module, head: str) -> list[str]:
    """Replace the last average pooling. Returns the paths of the layers with parameters between it and the head."""
    pools = [path for path, part in module.named_modules() if _is_average(part)]
    if not pools:
        raise CannotReadOutError("no layer of it averages feature maps")
    path = pools[-1]
    pool: Any = module.get_submodule(path)
    last = getattr(pool, "dim", (2, 3)) == (1, 2)  # channels come last
    module.set_submodule(path, AverageAndMax(3 if last else 1, bool(getattr(pool, "flatten", False))))
    paths = [path for path, _ in module.named_modules()]
    after = paths[paths.index(path) + 1 : paths.index(head)]
    return [each for each in after if next(module.get_submodule(each).parameters(recurse=False), None) is not None]


def _is_average(part: nn.Module) -> bool:
    """Whether a layer averages each feature map to one value: torch's, or timm's for any order of dimensions."""
    is_torch = isinstance(part, nn.AdaptiveAvgPool2d) and part.output_size in (1, (1, 1))
    return is_torch or type(part).__name__ == "FastAdaptiveAvgPool"


def _pool_tokens(module: Any, readout: str) -> tuple[list[str], tuple[str, ...]]:
    """Replace the pooling of tokens. Returns the paths of layers between it and the head, and of those left out."""
    if isinstance(module, VisionTransformer):
        kind: Any = type(module.encoder)
        module.encoder.__class__ = _reading_out(kind, readout)
        return [], ()
    if not hasattr(module, "attn_pool") or not hasattr(module, "num_prefix_tokens"):
        raise CannotReadOutError("its code has no tokens that can be read out")
    if readout != "mean" and getattr(module, "cls_token", None) is None:
        raise CannotReadOutError("it has no class token")
    removed = () if module.attn_pool is None else ("attn_pool",)
    module.attn_pool = TokenReadout(readout, module.num_prefix_tokens)
    module.pool_include_prefix = True
    norm = getattr(module, "fc_norm", None)
    return (["fc_norm"] if norm is not None and any(True for _ in norm.parameters()) else []), removed


@functools.cache
def _reading_out(kind: Any, readout: str) -> Any:
    """torchvision's encoder with its tokens read out to one: its network gives the first one to the head."""
    read = TokenReadout(readout, 1)

    def forward(self: nn.Module, tokens: Tensor) -> Tensor:
        tokens = read.forward(kind.forward(self, tokens))  # called as a function: it must not become a submodule
        return tokens[:, None]

    return type(
        f"{kind.__name__}{readout.title().replace('_', '')}",
        (kind,),
        {"forward": forward, "__module__": kind.__module__},
    )
