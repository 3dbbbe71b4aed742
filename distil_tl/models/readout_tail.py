"""Read-outs of networks whose code can't be changed layer by layer, as they pool in a function or have two heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from distil_tl.models.head import replace_head
from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.maps_walk import Walk, blocks_of, stages_before_last
from distil_tl.models.readout_parts import (
    MAPS,
    MAPS_ORDER,
    TOKENS,
    TOKENS_ORDER,
    CannotReadOutError,
    inputs_of,
    joined,
)
from distil_tl.models.rows import AddsRow, GivesTokens, JoinsRows, Plan, ReadsOut, Waiting, Waits
from distil_tl.models.tail import Source, Tail, find_tail
from distil_tl.models.taps import GivesAverage, Taps, become

Wanted = Mapping[str, Sequence[str]]


def read_tail(
    module: nn.Module, groups: Sequence[LayerGroup], readouts: Sequence[str], num_classes: int, size: int
) -> tuple[Wanted, tuple[str, ...], dict[str, int]]:
    """Have the heads get these read-outs.

    Args:
        size: of the images in pixels, for a pass that finds where the network pools.

    Returns:
        The parts of each read-out, all parts in order, and their widths for the first head.

    Raises:
        CannotReadOutError: the network lacks one of them; it is as it was.
    """
    *body, last = groups
    heads = last.prefixes
    of_tokens = bool(set(readouts) & set(TOKENS))
    tail = find_tail(module, heads, size)
    wanted = _token_parts(tail, readouts) if of_tokens else _map_parts(tail, readouts)
    parts = joined(wanted, TOKENS_ORDER if of_tokens else MAPS_ORDER)
    own, earlier = {path: inputs_of(module, path) for path in heads}, Taps()
    widths = dict.fromkeys(parts, own[heads[0]])
    averages = [part for part in parts if part in ("third_last", "second_last")]
    ends = stages_before_last(Walk(_maps(tail)), module, body, len(averages)) if averages else []
    if blocks := [part for part in parts if part in ("fourth_token", "third_token", "second_token")]:
        _join_blocks(module, tail, body, len(blocks))
    rows = [*blocks, _own_part(tail) if of_tokens else "average"]
    if extra := [part for part in parts if part not in (*averages, *rows)]:
        for source in tail.sources:
            become(
                module.get_submodule(source.path), AddsRow, part=extra[0], rows=len(rows), places=source.places,
                first=source.first,
            )  # fmt: skip
        rows += extra
    for place, (part, end) in enumerate(zip(averages, ends, strict=True)):
        become(module.get_submodule(end.path), GivesAverage, taps=earlier, place=place, places=end.places)
        widths[part] = end.channels
    chosen = tuple(rows.index(part) for part in parts if part not in averages)
    before = sum(widths[part] for part in averages)
    for path in heads:
        replace_head(module, path, num_classes, before + len(chosen) * own[path])
    _let_heads_wait(module, Plan(heads, tail.dropouts, len(rows), chosen, len(averages)), earlier)
    return wanted, parts, widths


def _let_heads_wait(module: nn.Module, plan: Plan, earlier: Taps) -> None:
    waiting = Waiting()
    for place, path in enumerate(plan.heads):
        become(module.get_submodule(path), Waits, waiting=waiting, place=place)
    for path in {path for dropouts in plan.dropouts for path in dropouts}:
        become(module.get_submodule(path), Waits, waiting=waiting, place=None)
    become(module, ReadsOut, waiting=waiting, earlier=earlier, plan=plan)


def _maps(tail: Tail) -> Sequence[tuple[str, tuple[int, ...]]]:
    """What layers returned; without tokens where it is not known that all of them are of patches."""
    return [(path, shape) for path, shape in tail.returned if tail.sources or len(shape) == 4]


def _own_part(tail: Tail) -> str:
    """The part that the library's own pooling of tokens gives."""
    return "token" if tail.sources[0].pooling == "token" else "mean"


def _token_parts(tail: Tail, readouts: Sequence[str]) -> Wanted:
    if not tail.sources:
        raise CannotReadOutError("its code has no tokens that can be read out")
    if not all(source.first for source in tail.sources):
        tokens = len(tail.sources[0].shape) == 3
        raise CannotReadOutError("it has no class token" if tokens else "its code has no tokens that can be read out")
    if set(readouts) & (set(MAPS) - {"pooled"}):
        raise CannotReadOutError("no layer of it averages feature maps")
    return {name: TOKENS.get(name, (_own_part(tail),)) for name in readouts}


def _map_parts(tail: Tail, readouts: Sequence[str]) -> Wanted:
    if any(source.first for source in tail.sources) or ("avg_max" in readouts and not tail.sources):
        raise CannotReadOutError("no layer of it averages feature maps")
    return {name: MAPS[name] for name in readouts}


def _join_blocks(module: nn.Module, tail: Tail, groups: Sequence[LayerGroup], count: int) -> None:
    """Have the last block also give the tokens of `count` blocks before it, so that what follows norms them, too."""
    source: Source = tail.sources[0]
    candidates, paths = set(blocks_of(module, groups)), [path for path, _ in tail.returned]
    blocks = [path for path, shape in tail.returned if path in candidates and shape == source.shape]
    if len(tail.sources) > 1 or len(blocks) <= count or any(paths.count(path) > 1 for path in blocks):
        raise CannotReadOutError(f"it has no {count + 1} blocks with class tokens")
    taps = Taps()
    for place, path in enumerate(blocks[-count - 1 : -1]):
        become(module.get_submodule(path), GivesTokens, taps=taps, place=place, only_first=source.pooling == "average")
    become(module.get_submodule(blocks[-1]), JoinsRows, taps=taps, count=count)
