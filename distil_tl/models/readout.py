"""Read-outs: what of the feature maps or tokens of a network its head gets.

The layers of the network keep their names, so its weights are loaded and saved as before. Only its head has another
width, and where the pooling is followed by layers of its own, such as a norm, they are applied to each part.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from distil_tl.models.head import replace_head
from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.names import READOUTS
from distil_tl.models.readout_maps import has_average_pool, read_maps
from distil_tl.models.readout_parts import (
    MAPS,
    MAPS_ORDER,
    TOKENS,
    TOKENS_ORDER,
    CannotReadOutError,
    columns_of,
    joined,
)
from distil_tl.models.readout_tail import read_tail
from distil_tl.models.readout_tokens import has_tokens, own_part, read_tokens
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


_KNOWN: dict[tuple[str, int], tuple[str, ...]] = {}  # read-outs by the name of a model and its image size


def set_readouts(
    name: str,
    module: nn.Module,
    groups: Sequence[LayerGroup],
    readouts: Sequence[str],
    num_classes: int,
    size: int,
    build_again: Callable[[], tuple[nn.Module, Sequence[LayerGroup]]],
) -> ReadOut:
    """Give `module` read-outs side by side, in place, and a head of their width.

    Args:
        name: of the model.
        groups: its layer groups.
        readouts: of `READOUTS`, but not pooled alone.
        size: of the images in pixels, for a trial.
        build_again: the network and its layer groups on the device `meta`, to name the read-outs that it has.

    Raises:
        UserError: the network lacks one of the read-outs.
    """
    try:
        return _set(module, groups, readouts, num_classes, size)
    except CannotReadOutError as error:
        if (name, size) not in _KNOWN:
            _KNOWN[name, size] = _readouts_of(*build_again(), size)
        *others, last = _KNOWN[name, size]
        valid = f"{', '.join(others)} or {last}" if others else last
        raise UserError(
            f"model.readout={'+'.join(readouts)}: not possible with {name}, as {error}; use {valid}"
        ) from error


def _readouts_of(module: nn.Module, groups: Sequence[LayerGroup], size: int) -> tuple[str, ...]:
    """The read-outs that a network on the device `meta` has."""
    found = []
    for readout in READOUTS:
        if readout != "pooled":
            try:
                with torch.device("meta"):  # a new head, too
                    _set(copy.deepcopy(module), groups, [readout], 2, size)
            except CannotReadOutError:
                continue
        found.append(readout)
    return tuple(found)


def _set(
    module: nn.Module, groups: Sequence[LayerGroup], readouts: Sequence[str], num_classes: int, size: int
) -> ReadOut:
    of_tokens, several = bool(set(readouts) & set(TOKENS)), len(groups[-1].prefixes) > 1
    found: ReadOut | None = None
    if of_tokens and has_tokens(module) and not several:
        found = _set_tokens(module, groups[-1].prefixes[0], readouts, num_classes)
    elif has_average_pool(module) and not of_tokens and not several:
        with contextlib.suppress(CannotReadOutError):  # the network is then as it was
            found = _set_maps(module, groups, readouts, num_classes, size)
    if found is None:
        wanted, parts, widths = read_tail(module, groups, readouts, num_classes, size)
        found = ReadOut(columns_of(wanted, parts, widths))
    if reason := failure_at(module, size):
        raise CannotReadOutError(f"its layers do not take it ({reason})")
    return found


def _set_tokens(module: nn.Module, head: str, readouts: Sequence[str], num_classes: int) -> ReadOut:
    own = own_part(module, pooled="pooled" in readouts)
    wanted = {name: TOKENS.get(name, (own,)) for name in readouts}
    if set(readouts) & (set(MAPS) - {"pooled"}):
        raise CannotReadOutError("no layer of it averages feature maps")
    parts = joined(wanted, TOKENS_ORDER)
    widths, removed = read_tokens(module, head, parts)
    replace_head(module, head, num_classes, sum(widths[part] for part in parts))
    return ReadOut(columns_of(wanted, parts, widths), removed)


def _set_maps(
    module: nn.Module, groups: Sequence[LayerGroup], readouts: Sequence[str], num_classes: int, size: int
) -> ReadOut:
    wanted = {name: MAPS[name] for name in readouts}
    *body, last = groups
    parts, (head,) = joined(wanted, MAPS_ORDER), last.prefixes
    widths = read_maps(module, head, parts, body, num_classes, size)
    replace_head(module, head, num_classes, sum(widths[part] for part in parts))
    return ReadOut(columns_of(wanted, parts, widths))
