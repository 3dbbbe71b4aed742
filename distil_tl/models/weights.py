"""Weights on disk: read without ever running what a file contains, and loaded strictly."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distil_tl.models.layer_groups import under
from distil_tl.models.names import WEIGHTS_SUFFIXES
from distil_tl.utils.errors import UserError

State = Mapping[str, Tensor]
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.")
_SHOWN = 5
# A zip archive; a pickle, as before torch 1.6. Whatever else, say an error page, is no case for converting.
_MAGIC = (b"PK\x03\x04", b"\x80")
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "c = torch.load(sys.argv[1], 'cpu', weights_only=False); c = c.get('state_dict', c.get('model', c)); "
    "save_file({k: v.contiguous().clone() for k, v in c.items()}, sys.argv[2])"
)


def read_state(path: Path) -> State:
    """The tensors of a weights file by name, on the CPU.

    `.safetensors`, or what `torch.save` wrote of tensors and plain containers; a state dict inside a training
    checkpoint is found under its usual names.

    Raises:
        UserError: the file cannot be read, holds code to run, or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path, device="cpu"))
        with path.open("rb") as file:
            if not file.read(4).startswith(_MAGIC):
                raise ValueError("not written by torch.save")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.weights: {path} holds Python objects other than tensors. Loading those could run code "
            f"hidden in the file, so it is refused. If you trust where it comes from, convert it once on a "
            f"machine you can spare, and give the new file as model.weights:\n"
            f'  python -c "{_CONVERT}" {path} {path.with_suffix(".safetensors")}'
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model.weights: {path} is not a readable weights file ({type(error).__name__}: {error}); "
            f"copy it again, or give another {', '.join(WEIGHTS_SUFFIXES)} file"
        ) from error
    return _unwrap(loaded, path)


def _unwrap(loaded: object, path: Path) -> State:
    if isinstance(loaded, Mapping) and not _is_state(loaded):
        loaded = next((loaded[key] for key in _WRAPPERS if _is_state(loaded.get(key))), loaded)
    if isinstance(loaded, Mapping) and _is_state(loaded):
        return loaded
    found = list(loaded)[:_SHOWN] if isinstance(loaded, Mapping) else type(loaded).__name__
    raise UserError(
        f"model.weights: {path} holds no state dict (found {found}); save `model.state_dict()`, plain or "
        f"under one of the keys {', '.join(_WRAPPERS)}"
    )


def _is_state(value: object) -> bool:
    """Whether `value` maps names to tensors and nothing else."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def strip_prefixes(state: State, expected: Iterable[str]) -> State:
    """`state` without prefixes such as `module.` that every name has and none in `expected`."""
    expected = list(expected)
    for _ in _PREFIXES:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None or any(name.startswith(prefix) for name in expected):
            break
        state = renamed(state, {name: name.removeprefix(prefix) for name in state}, prefix)
    return state


def renamed(state: State, names: Mapping[str, str], prefix: str = "") -> State:
    """`state` under new names by old ones; `prefix` is what the new ones lack in front."""
    result = OrderedDict((names[name], tensor) for name, tensor in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        # Layer versions by module path: without them old BatchNorms and MNASNets are misread.
        versions = {path[len(prefix) :]: v for path, v in metadata.items() if path.startswith(prefix)}
        versions[""] = metadata.get(prefix.rstrip("."), {})
        result.__dict__["_metadata"] = versions
    return result


def load_backbone(module: nn.Module, state: State, *, skip: tuple[str, ...], source: str) -> None:
    """Loads `state` into `module` but for what lies under the paths `skip`: the head, auxiliary classifiers.

    Raises:
        UserError: a tensor of the backbone is missing, unknown or of another shape.
    """
    kept = OrderedDict((name, tensor) for name, tensor in state.items() if not under(name, skip))
    # Only the root's version is made up: MNASNet insists on one, and BatchNorms without any accept old files.
    versions = dict(getattr(state, "_metadata", None) or {})
    versions[""] = {"version": module._version, **versions.get("", {})}
    kept.__dict__["_metadata"] = versions
    try:
        missing, unexpected = module.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]]
    else:
        wrong = [f"missing {name}" for name in missing if not under(name, skip)]
        wrong += [f"unexpected {name}" for name in unexpected]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"model.weights: {source} does not fit this model, {len(wrong)} tensors differ: "
            f"{'; '.join(wrong[:_SHOWN])}{more}. "
            "Give weights of the same architecture, or set model.name to theirs"
        )


def match_by_position(state: State, module: nn.Module, *, skip_shape: tuple[str, ...], source: str) -> State:
    """`state` under the names of `module`, whose tensors come in the same order under other names.

    Shapes and the last part of each name have to agree; shapes below the paths `skip_shape` may differ.

    Raises:
        UserError: the two do not correspond.
    """
    expected = module.state_dict()
    heads = tuple(path + "." for path in skip_shape)
    fits = len(state) == len(expected) and all(
        theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        and (ours.startswith(heads) or state[theirs].shape == expected[ours].shape)
        for theirs, ours in zip(state, expected, strict=True)
    )
    if not fits:
        raise UserError(f"model.weights: {source} does not hold this model; set model.weights=default or a path")
    return dict(zip(expected, state.values(), strict=True))
