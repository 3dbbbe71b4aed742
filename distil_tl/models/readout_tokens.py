"""Read-outs of tokens: the class token, the mean of the patches, and class tokens of earlier blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from distil_tl.models.readout_parts import TOKENS_ORDER, CannotReadOutError, apply_to_parts, inputs_of
from distil_tl.models.taps import GivesClassToken, JoinsToTokens, Taps, become

_LAST = TOKENS_ORDER.index("token")


class TokenReadout(nn.Module):
    """Tokens [N, T, C] to some of them and the mean of the patches, one after the other.

    Args:
        parts: of `TOKENS_ORDER`; `own` is left out.
        earlier: class tokens of earlier blocks, which are the first tokens.
        others: tokens between these and those of the patches, the class token first.
    """

    def __init__(self, parts: Sequence[str], earlier: int, others: int) -> None:
        super().__init__()
        self.parts, self.earlier, self.others = tuple(parts), earlier, others

    def forward(self, tokens: Tensor) -> Tensor:
        chosen = []
        for part in self.parts:
            if part == "mean":
                chosen.append(tokens[:, self.earlier + self.others :].mean(1))
            elif part != "own":
                chosen.append(tokens[:, self.earlier - _LAST + TOKENS_ORDER.index(part)])
        return torch.cat(chosen, 1)

    def extra_repr(self) -> str:
        return f"{', '.join(self.parts)}, earlier={self.earlier}, others={self.others}"


def has_tokens(module: nn.Module) -> bool:
    """Whether a layer of the network pools tokens: torchvision's encoder, or a pooling that timm leaves to be set."""
    is_torchvision = isinstance(module, VisionTransformer)
    return is_torchvision or (hasattr(module, "attn_pool") and hasattr(module, "num_prefix_tokens"))


def own_part(module: Any, *, pooled: bool) -> str:
    """The part that the pooling of the library gives: `token`, `mean`, or else `own`.

    Raises:
        CannotReadOutError: with `pooled` this pooling can't be computed beside others.
    """
    if isinstance(module, VisionTransformer):
        return "token"
    kind = getattr(module, "global_pool", "")
    if module.attn_pool is not None:
        return "own"
    if kind == "avg" and not getattr(module, "pool_include_prefix", False):
        return "mean"
    if pooled and kind != "token":
        raise CannotReadOutError("its own pooling can't be computed beside others")
    return "token"


def read_tokens(module: Any, head: str, parts: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Have the head get these parts, of `TOKENS_ORDER`. Returns their widths, and paths of layers left out.

    Raises:
        CannotReadOutError: the network lacks one of them.
    """
    is_torchvision = isinstance(module, VisionTransformer)
    earlier = max(0, _LAST - TOKENS_ORDER.index(parts[0]))
    has_token = is_torchvision or getattr(module, "cls_token", None) is not None
    if TOKENS_ORDER.index(parts[0]) <= _LAST and not has_token:
        raise CannotReadOutError("it has no class token")
    if earlier:
        trunk = module.encoder if is_torchvision else module
        _give_class_tokens(*((trunk.layers, trunk.ln) if is_torchvision else (trunk.blocks, trunk.norm)), earlier)
    widths, removed = dict.fromkeys(parts, inputs_of(module, head)), tuple[str, ...]()
    kind: Any
    if is_torchvision:
        kind = type(module.encoder)
        module.encoder.__class__ = _reading_out(kind, tuple(parts), earlier)
        return widths, removed
    readout = TokenReadout(parts, earlier, module.num_prefix_tokens)
    if "own" in parts:
        first = 0 if getattr(module, "pool_include_prefix", True) else module.num_prefix_tokens
        kind = type(module.attn_pool)
        module.attn_pool.__class__ = _pooling_too(kind)
        module.attn_pool.beside, module.attn_pool.first = readout, earlier + first
    else:
        removed = () if module.attn_pool is None else ("attn_pool",)
        module.attn_pool = readout
    module.pool_include_prefix = True
    norm = getattr(module, "fc_norm", None)
    apply_to_parts(module, ["fc_norm"] if norm is not None and any(True for _ in norm.parameters()) else [], len(parts))
    return widths, removed


def _give_class_tokens(blocks: Any, norm: Any, count: int) -> None:
    """Have the blocks before the last one give their class tokens to the norm after it, which norms them, too."""
    if len(blocks) <= count:
        raise CannotReadOutError(f"it has no {count + 1} blocks")
    taps = Taps()
    for place in range(count):
        become(blocks[place - count - 1], GivesClassToken, taps=taps, place=place)
    become(norm, JoinsToTokens, taps=taps, count=count)


@functools.cache
def _reading_out(kind: Any, parts: tuple[str, ...], earlier: int) -> Any:
    """torchvision's encoder with its tokens read out to one: its network gives the first one to the head."""
    read = TokenReadout(parts, earlier, 1)

    def forward(self: nn.Module, tokens: Tensor) -> Tensor:
        tokens = read.forward(kind.forward(self, tokens))  # called as a function: it must not become a submodule
        return tokens[:, None]

    name = f"{kind.__name__}{''.join(part.title().replace('_', '') for part in parts)}"
    return type(name, (kind,), {"forward": forward, "__module__": kind.__module__})


@functools.cache
def _pooling_too(kind: Any) -> Any:
    """A pooling of tokens with a read-out `beside` it, which has no parameters; its own result is the last part."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        return torch.cat([self.beside(tokens), kind.forward(self, tokens[:, self.first :])], 1)

    return type(f"{kind.__name__}WithTokens", (kind,), {"forward": forward, "__module__": kind.__module__})
