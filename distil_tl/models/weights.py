"""Weights files: read without running any code in them, and loaded strictly."""

from __future__ import annotations

import json
import pickle
import shlex
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distil_tl.models.layer_groups import has_prefix
from distil_tl.models.library_folder import class_names
from distil_tl.models.names import WEIGHTS_SUFFIXES
from distil_tl.utils.errors import UserError, listed
from distil_tl.utils.log import logger

StateDict = Mapping[str, Tensor]
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "net")
_MAX_LISTED = 5
# A zip archive, or a pickle (torch before 1.6). Conversion is not suggested for other files, such as an error page.
_MAGIC = (b"PK\x03\x04", b"\x80")
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "c = torch.load(sys.argv[1], 'cpu', weights_only=False); "
    "c = c.get('state_dict', c.get('model', c)) if isinstance(c, dict) else c; "
    "c = c if isinstance(c, dict) else c.state_dict(); "
    "save_file({k: v.contiguous().clone() for k, v in c.items()}, sys.argv[2])"
)
# Runs the program that a TorchScript file holds.
_CONVERT_SCRIPT = (
    "import sys, torch; from safetensors.torch import save_file; c = torch.jit.load(sys.argv[1], 'cpu').state_dict(); "
    "save_file({k: v.contiguous().clone() for k, v in c.items()}, sys.argv[2])"
)


def read_state_dict(path: Path) -> StateDict:
    """The state dict in a weights file, on the CPU.

    All values are finite. The file is `.safetensors`, or was written by `torch.save` from tensors and plain
    containers. In a training checkpoint the state dict is searched under the usual keys.

    Raises:
        UserError: the file cannot be read, contains code to run, or contains no state dict.
    """
    return _finite(_unwrap(_load(path), path), path)


def read_classifier(path: Path) -> tuple[StateDict, list[str] | None]:
    """`read_state_dict`, with the names of the classes, in the order of the logits; None if the file has none.

    They are in a list `classes` or a mapping `class_to_idx` beside the state dict; in a `.safetensors` file they are
    JSON in its metadata. Raises as `read_state_dict`, and if they are something else.
    """
    loaded = _load(path)
    beside: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {}
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            beside = file.metadata() or {}
    return _finite(_unwrap(loaded, path), path), _classes_beside(beside, path)


def _classes_beside(content: Mapping[str, Any], path: Path) -> list[str] | None:
    found = [key for key in ("classes", "class_to_idx") if not isinstance(content.get(key), (Tensor, NoneType))]
    if not found:
        return None
    key = found[0]
    names, what = content[key], f"model.weights: {key} in {path}"
    if isinstance(names, str):
        try:
            names = json.loads(names)
        except (ValueError, RecursionError):
            raise UserError(f"{what} is not JSON; remove it, or write the file again") from None
    if isinstance(names, Mapping):
        positions = list(names.values())
        if not all(type(i) is int for i in positions) or sorted(positions) != list(range(len(names))):
            raise UserError(f"{what} does not count the classes from 0; remove it, or write the file again")
        names = sorted(names, key=names.__getitem__)
    return class_names(names, what)


def _load(path: Path) -> object:
    """The content of a weights file, on the CPU. Raises as `read_state_dict`."""
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path, device="cpu"))
        with path.open("rb") as file:
            if not file.read(4).startswith(_MAGIC):
                raise ValueError("not written by torch.save")
        if _is_torchscript(path):
            raise UserError(
                f"model.weights: {path} is a TorchScript program, which is run to load it, so it is refused. If you "
                f"trust its source, convert it once on an isolated machine, and give the new file as model.weights:\n"
                f"  {_command(_CONVERT_SCRIPT, path)}"
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.weights: {path} holds Python objects other than tensors. Loading those could run code "
            f"hidden in the file, so it is refused. If you trust its source, convert it once on an isolated "
            f"machine, and give the new file as model.weights:\n"
            f"  {_command(_CONVERT, path)}"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model.weights: {path} is not a readable weights file ({type(error).__name__}: {error}); "
            f"copy it again, or give another {', '.join(WEIGHTS_SUFFIXES)} file"
        ) from error


def _command(code: str, path: Path) -> str:
    return f'python -c "{code}" {shlex.join([str(path), str(path.with_suffix(".safetensors"))])}'


def _is_torchscript(path: Path) -> bool:
    """Whether a file was written by `torch.jit.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _finite(state: StateDict, path: Path) -> StateDict:
    """`state`. Raises UserError if a value is NaN or infinite, as after a training that diverged."""
    wrong = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise UserError(
            f"model.weights: {path} holds values that are NaN or infinite, in {listed(wrong, _MAX_LISTED)}; give "
            f"weights of an earlier checkpoint"
        )
    return state


def _unwrap(loaded: object, path: Path) -> StateDict:
    if isinstance(loaded, Mapping) and not _is_state_dict(loaded):
        loaded = next((loaded[key] for key in _WRAPPERS if _is_state_dict(loaded.get(key))), loaded)
    if isinstance(loaded, Mapping) and _is_state_dict(loaded):
        return loaded
    content = f"keys {list(loaded)[:_MAX_LISTED]}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
    raise UserError(
        f"model.weights: {path} contains no state dict, but {content}; save `model.state_dict()`, directly or "
        f"under one of the keys {', '.join(_WRAPPERS)}"
    )


def _is_state_dict(value: object) -> bool:
    """Whether `value` is a non-empty mapping from names to tensors."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def strip_prefixes(state: StateDict, expected: Iterable[str]) -> StateDict:
    """The part of `state` that holds the names in `expected`, without what stands in front of them.

    A training checkpoint may hold the model as `module.encoder.*`, beside a loss or another head. The prefix that gives
    most of the expected names is removed; names without it are left out.
    """
    known, found = set(expected), Counter[str]()
    for name in state:
        parts = name.split(".")
        found.update(".".join([*parts[:i], ""]) if i else "" for i in range(len(parts)) if ".".join(parts[i:]) in known)
    if not found or found[""] == max(found.values()):
        return state
    prefix = max(found, key=found.__getitem__)
    names = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if len(names) < len(state):
        others = [name for name in state if name not in names]
        left_out = listed(others, _MAX_LISTED)
        logger.info("model.weights: left out %d tensors outside %s: %s", len(others), prefix, left_out)
    return renamed(state, names, prefix)


def renamed(state: StateDict, names: Mapping[str, str], prefix: str = "") -> StateDict:
    """`state` with other names.

    Args:
        names: the new name for each old one; tensors without one are left out.
        prefix: what was removed at the front of all names.
    """
    result = OrderedDict((names[name], tensor) for name, tensor in state.items() if name in names)
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        # Layer versions by module path: without them, state dicts of old BatchNorms and MNASNets are misread.
        versions = {path[len(prefix) :]: v for path, v in metadata.items() if path.startswith(prefix)}
        versions[""] = metadata.get(prefix.rstrip("."), {})
        result.__dict__["_metadata"] = versions
    return result


def load_backbone(module: nn.Module, state: StateDict, *, skip: tuple[str, ...], source: str) -> None:
    """Load `state` into `module`, except for the paths `skip`: the head and auxiliary classifiers.

    Raises:
        UserError: a tensor of the backbone is missing, unexpected or of another shape.
    """
    kept = OrderedDict((name, tensor) for name, tensor in state.items() if not has_prefix(name, skip))
    # A version is added for the root only: MNASNet requires one, and BatchNorms without a version accept old files.
    versions = dict(getattr(state, "_metadata", None) or {})
    versions[""] = {"version": module._version, **versions.get("", {})}
    kept.__dict__["_metadata"] = versions
    try:
        missing, unexpected = module.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        differences = _other_shapes(kept, module) or [line.strip() for line in str(error).splitlines()[1:]]
    else:
        differences = [f"missing {name}" for name in missing if not has_prefix(name, skip)]
        differences += [f"unexpected {name}" for name in unexpected]
    if differences:
        unlike = sum(name in state for name in module.state_dict()) * 2 < len(state)
        own = f" (its tensors are {listed(list(state), _MAX_LISTED)})" if unlike else ""
        more = f"; and {len(differences) - _MAX_LISTED} more" if len(differences) > _MAX_LISTED else ""
        raise UserError(
            f"model.weights: {source}{own} does not fit this model, {len(differences)} tensors differ: "
            f"{'; '.join(differences[:_MAX_LISTED])}{more}. "
            "Give weights of the same architecture, or set model.name to the architecture of these"
        )


def _other_shapes(state: StateDict, module: nn.Module) -> list[str]:
    """The tensors that have another shape than in the module."""
    return [
        f"{name} is {list(state[name].shape)} in the file, and {list(expected.shape)} in the model"
        for name, expected in module.state_dict().items()
        if name in state and state[name].shape != expected.shape
    ]


def log_old_head(state: StateDict, heads: tuple[str, ...], source: str) -> None:
    """Say which tensors of a file are left out, as the new head takes their place."""
    old = [f"{name} {list(tensor.shape)}" for name, tensor in state.items() if has_prefix(name, heads)]
    if old:
        logger.info(
            "model.weights: the head of %s is left out for a new one: %s", source, listed(sorted(old), _MAX_LISTED)
        )


def match_by_position(state: StateDict, module: nn.Module, *, skip_shape: tuple[str, ...], source: str) -> StateDict:
    """`state` with the names of `module`, for a file whose tensors have other names but the same order.

    Shapes and the last part of each name must agree; shapes inside the paths `skip_shape` may differ.

    Raises:
        UserError: the state dict does not match the module.
    """
    expected = module.state_dict()
    heads = tuple(path + "." for path in skip_shape)
    fits = len(state) == len(expected) and all(
        theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        and (ours.startswith(heads) or state[theirs].shape == expected[ours].shape)
        for theirs, ours in zip(state, expected, strict=True)
    )
    if not fits:
        raise UserError(f"model.weights: {source} does not contain this model; set model.weights=default or a path")
    return dict(zip(expected, state.values(), strict=True))
