"""Read-outs: what of the feature maps or tokens of a network its head gets.

The layers of the network keep their names, so its weights are loaded and saved as before. Only its head has another
width, and where the pooling is followed by layers of its own, such as a norm, they are applied to each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from distil_tl.models.head import replace_head
from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.readout_maps import read_maps
from distil_tl.models.readout_parts import (
    MAPS,
    MAPS_ORDER,
    TOKENS,
    TOKENS_ORDER,
    CannotReadOutError,
    columns_of,
    joined,
)
from distil_tl.models.readout_tokens import own_part, read_tokens
from distil_tl.models.size_trial import failure_at
from distil_tl.utils.errors import UserError


@dataclass(frozen=True)
class ReadOut:
    """What the head of a network gets.

    Attributes:
        columns: of its inputs, the first one and the one after the last, by read-out.
        removed: paths of layers that the network has no more.
    """

    columns: dict[str, tuple[int, int]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


def set_readouts(
    name: str, module: nn.Module, groups: Sequence[LayerGroup], readouts: Sequence[str], num_classes: int, size: int
) -> ReadOut:
    """Give `module` read-outs side by side, in place, and a head of their width.

    Args:
        name: of the model.
        groups: its layer groups.
        readouts: of `READOUTS`, but not pooled alone.
        size: of the images in pixels, for a trial.

    Raises:
        UserError: the network lacks one of the read-outs.
    """
    try:
        return _set(module, groups, readouts, num_classes, size)
    except CannotReadOutError as error:
        raise UserError(
            f"model.readout={'+'.join(readouts)}: not possible with {name}, as {error}; use pooled"
        ) from error


def _set(
    module: nn.Module, groups: Sequence[LayerGroup], readouts: Sequence[str], num_classes: int, size: int
) -> ReadOut:
    *body, heads = groups
    if len(heads.prefixes) != 1:
        raise CannotReadOutError("it has two heads")
    head, removed = heads.prefixes[0], tuple[str, ...]()
    if set(readouts) & set(TOKENS):
        own = own_part(module, pooled="pooled" in readouts)
        wanted = {name: TOKENS.get(name, (own,)) for name in readouts}
        if set(readouts) & (set(MAPS) - {"pooled"}):
            raise CannotReadOutError("no layer of it averages feature maps")
        parts = joined(wanted, TOKENS_ORDER)
        widths, removed = read_tokens(module, head, parts)
    else:
        wanted = {name: MAPS[name] for name in readouts}
        parts = joined(wanted, MAPS_ORDER)
        widths = read_maps(module, head, parts, body, num_classes, size)
    replace_head(module, head, num_classes, sum(widths[part] for part in parts))
    if reason := failure_at(module, size):
        raise CannotReadOutError(f"its layers do not take it ({reason})")
    return ReadOut(columns_of(wanted, parts, widths), removed)
