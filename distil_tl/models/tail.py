"""The tail of a network: what its heads get, and from which layer's feature maps or tokens it is pooled.

It is found in one pass of an image, of which all functions are recorded. So it does not matter whether the network
pools in a layer or in a function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from distil_tl.models.graph.equivalence import TOLERANCE
from distil_tl.models.readout_parts import CannotReadOutError, inputs_of
from distil_tl.models.traced_pass import run_traced

Pooling = Literal["average", "token"]

_AVERAGES = ("mean", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "avg_pool2d")
_KEEP_ORDER = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "contiguous", "dropout")  # a maximum stays one


@dataclass(frozen=True)
class Source:
    """A layer or block whose feature maps [N, C, H, W] or [N, H, W, C], or tokens [N, T, C], are pooled.

    Attributes:
        path: of it.
        pooling: the average of the patches, or the class token.
        places: the dimensions that are pooled.
        first: tokens before those of the patches.
        shape: of its output for one image.
    """

    path: str
    pooling: Pooling
    places: tuple[int, ...]
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tail:
    """The end of a network.

    Attributes:
        sources: what is pooled, for all heads; empty if it is not known.
        dropouts: for each head, the paths of those right before it.
        returned: path and shape of the output of each layer and block before the pooling, in order; of a tuple, its
            first tensor's.
    """

    sources: tuple[Source, ...]
    dropouts: tuple[tuple[str, ...], ...]
    returned: Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class _Step:
    """A call of a function that made a tensor.

    Attributes:
        inputs: tensors that depend on the image.
        order: how many steps and calls of modules ended before.
    """

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    inputs: list[Tensor]
    order: int


@dataclass(frozen=True)
class _Call:
    """A call of a module that has ended."""

    path: str
    output: Tensor
    order: int


@dataclass
class _Record(TorchFunctionMode):
    """All calls of functions and modules. Their tensors stay alive, so that no address is used again."""

    images: Tensor
    steps: dict[int, _Step] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    heads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(_tensors((args, kwargs or {})))
        self.kept.append((given, result))
        known = [each for each in given if each is self.images or id(each) in self.steps]
        for tensor in _tensors(result):
            if not any(tensor is each for each in given):  # else it changed a tensor in place, or did nothing
                name = getattr(func, "__name__", "")
                self.steps[id(tensor)] = _Step(name, args, kwargs or {}, known, len(self.kept) + len(self.calls))
        return result

    def ended(self, path: str, output: Any) -> None:
        tensor = next(iter(_tensors(output)), None)
        if tensor is not None:
            self.calls.append(_Call(path, tensor, len(self.kept) + len(self.calls)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def find_tail(module: nn.Module, heads: Sequence[str], size: int) -> Tail:
    """Run `module` on an image.

    Args:
        heads: paths of its heads, whose logits it averages.
        size: of the image in pixels.

    Raises:
        CannotReadOutError: it fails, or its heads are not its last layers.
    """
    record = _record(module, heads, size)
    sources = dict[str, Source]()
    for path in heads:
        found = _source(record, record.heads[path][0], module)
        if found is None:
            sources = {}
            break
        sources[found.path] = found
    ends = [call.order for call in record.calls if call.path in sources] or [len(record.kept) + len(record.calls)]
    before = [call for call in record.calls if call.order <= max(ends)]
    drops = [call for call in record.calls if isinstance(module.get_submodule(call.path), _DropoutNd)]
    dropouts = [tuple(call.path for call in drops if call.output is record.heads[path][0]) for path in heads]
    return Tail(tuple(sources.values()), tuple(dropouts), [(call.path, tuple(call.output.shape)) for call in before])


def _record(module: nn.Module, heads: Sequence[str], size: int) -> _Record:
    device = next(module.parameters()).device
    record = _Record(torch.rand(1, 3, size, size, device=device, generator=_generator(device)))

    def ended(path: str, args: Any, output: Any) -> None:
        if path:
            record.ended(path, output)
        if path in heads:
            record.heads[path] = (args[0], output)

    logits = run_traced(module, record.images, ended, record)
    _check_heads(module, heads, record, logits)
    return record


def _generator(device: torch.device) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


def _check_heads(module: nn.Module, heads: Sequence[str], record: _Record, logits: Any) -> None:
    """Check that each head gets one vector, and that the output is the average of their logits."""
    reason = "its head is not its last layer"
    if set(record.heads) != set(heads) or not isinstance(logits, Tensor):
        raise CannotReadOutError(reason)
    for path, (given, _) in record.heads.items():
        dimensions = 4 if isinstance(module.get_submodule(path), nn.Conv2d) else 2
        if given.numel() != inputs_of(module, path) or given.ndim != dimensions:
            raise CannotReadOutError("its head comes before its pooling")
    average = torch.stack([output.flatten(1) for _, output in record.heads.values()]).mean(0)
    if average.shape != logits.shape:
        raise CannotReadOutError(reason)
    if not logits.is_meta and not (average - logits).abs().max() <= TOLERANCE * logits.abs().max():
        raise CannotReadOutError(reason)


def _source(record: _Record, given: Tensor, module: nn.Module) -> Source | None:
    """What the input of a head is pooled from; None if its code is not known to pool so."""
    value, prefixed = given, getattr(module, "num_prefix_tokens", 1)
    prefixed = max(1, prefixed) if isinstance(prefixed, int) else 1
    while (step := record.steps.get(id(value))) is not None and len(step.inputs) == 1:
        maps = step.inputs[0]
        if (pooled := _pooled(step, maps, value, prefixed)) is not None:
            return _layer_of(record, maps, *pooled, step.order, module)
        value = maps
    return None


def _pooled(step: _Step, maps: Tensor, result: Tensor, prefixed: int) -> tuple[Pooling, tuple[int, ...]] | None:
    """The kind of pooling of a step, and the dimensions that it pools; None if it is none.

    Args:
        prefixed: tokens before those of the patches.
    """
    places: tuple[int, ...]
    if step.name == "__getitem__" and maps.ndim == 3 and isinstance(step.args[1], tuple) and len(step.args[1]) > 1:
        rows, token = step.args[1][:2]
        return ("token", (1,)) if rows == slice(None) and type(token) is int and 0 <= token < prefixed else None
    if step.name not in _AVERAGES or maps.ndim not in (3, 4):
        return None
    places = (2, 3)[: maps.ndim - 2]
    if step.name == "mean":
        given = step.kwargs.get("dim", step.args[1] if len(step.args) > 1 else ())
        places = tuple(sorted(each % maps.ndim for each in ([given] if isinstance(given, int) else given)))
    channels = [each for each in range(1, maps.ndim) if each not in places]
    if 0 in places or len(channels) != 1 or result.numel() != maps.shape[channels[0]]:
        return None
    return "average", places


def _layer_of(
    record: _Record,
    maps: Tensor,
    pooling: Literal["average", "token"],
    places: tuple[int, ...],
    order: int,
    module: Any,
) -> Source | None:
    """The layer whose output is pooled, if only functions are in between that keep the order of values."""
    first = 0
    while True:
        calls = [call for call in record.calls if call.output is maps and call.order < order]
        if calls:
            break
        step = record.steps.get(id(maps))
        if step is None or len(step.inputs) != 1:
            return None
        if step.name == "__getitem__" and (skipped := _tokens_skipped(step)) is not None and pooling == "average":
            first += skipped
        elif step.name not in _KEEP_ORDER:
            return None
        maps = step.inputs[0]
    path, shape = calls[-1].path, tuple(maps.shape)
    if sum(call.path == path for call in record.calls) > 1:
        return None
    if pooling == "token":
        first = int(getattr(module, "num_prefix_tokens", 0)) or int(math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1)
    return Source(path, pooling, places, first, shape) if first or pooling == "average" else None


def _tokens_skipped(step: _Step) -> int | None:
    """How many tokens `tokens[:, n:]` leaves out; None for another index."""
    index = step.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None) or not isinstance(index[1], slice):
        return None
    start, stop, stride = index[1].start or 0, index[1].stop, index[1].step
    return start if stop is stride is None and isinstance(start, int) and start >= 0 else None
