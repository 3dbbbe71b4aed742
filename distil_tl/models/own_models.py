"""One's own network: `model.name=MODULE:NAME` names a function or class that returns it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distil_tl.models import timm_models
from distil_tl.models.graph.equivalence import preserve_state
from distil_tl.models.head import find_head, replace_head, seeded
from distil_tl.models.layer_groups import (
    HEAD,
    LayerGroup,
    groups_from_parts,
    groups_of_parameters,
    parameters_by_child,
)
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.size_trial import first_line
from distil_tl.models.torchvision_groups import torchvision_groups
from distil_tl.utils.errors import UserError, did_you_mean

_LIBRARIES = ("torch", "torchvision", "timm")  # their versions are recorded elsewhere
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_KEYS = ("mean", "std", "interpolation", "image_size", "crop_pct")


def name_problem(name: str) -> str | None:
    """The message for a name that can't be imported; None for a valid one."""
    try:
        given(name, 2, 224, pretrained=False)
        preprocess(name)
    except UserError as error:
        return str(error)
    return None


def callable_of(name: str) -> Callable[..., Any]:
    """The function or class that `name` names. The current folder is looked at after all others.

    Raises:
        UserError: there is none.
    """
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*path.split("."), *attribute.split(".")]):
        raise UserError(f"model.name={name}: write MODULE:FUNCTION, such as mypackage.networks:build")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise UserError(f"model.name={name}: {path} imports {error.name}, which is not installed") from error
        raise UserError(
            f"model.name={name}: there is no module {error.name} in the current folder ({here}), in PYTHONPATH, or "
            f"among the installed packages; correct the name, or start the command where it can be imported"
        ) from error
    except (Exception, SystemExit) as error:  # any code may run
        raise UserError(f"model.name={name}: importing {path} failed ({_described(error, path)})") from error
    try:
        found: Any = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"model.name={name}: {path} has no {attribute}{did_you_mean(attribute, public)}") from None
    if not callable(found):
        raise UserError(f"model.name={name}: {attribute} is a {type(found).__name__}, not a function or class")
    function: Callable[..., Any] = found
    return function


def _described(error: BaseException, path: str) -> str:
    """An error of the user's code, with its last line there."""
    root = path.partition(".")[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if root in Path(frame.filename).with_suffix("").parts]
    where = f", {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{first_line(error)}{where}"


def given(name: str, num_classes: int, image_size: int, *, pretrained: bool) -> dict[str, Any]:
    """The arguments that the function gets: those of `num_classes`, `image_size` and `pretrained` that it has.

    Raises:
        UserError: there is no such function, or it needs others.
    """
    function = callable_of(name)
    values = {"num_classes": num_classes, "image_size": image_size, "pretrained": pretrained}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some built-in functions
        return {}
    passed, missing = {}, []
    for each in parameters:
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name in values:
            passed[each.name] = values[each.name]
        elif each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            missing.append(each.name)
    if missing:
        raise UserError(
            f"model.name={name}: it has arguments without a default: {', '.join(missing)}; only {', '.join(values)} "
            f"are passed, so give the others a default"
        )
    return passed


def build(
    name: str, num_classes: int, image_size: int, *, pretrained: bool, seed: int
) -> tuple[nn.Module, tuple[str, ...], bool]:
    """The network with a not yet initialised head, the paths of the head, and whether the image size is fixed.

    Args:
        pretrained: whether its own weights are wanted; else others will be loaded, or they stay random.

    Raises:
        UserError: the function failed, or what it returned is no classifier.
    """
    function, arguments = callable_of(name), given(name, num_classes, image_size, pretrained=pretrained)
    try:
        with seeded(seed, "model"):
            module = function(**arguments)
    except (UserError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # any code may run
        path = name.partition(":")[0]
        raise UserError(f"model.name={name} failed ({_described(error, path)})") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"model.name={name} returned a {type(module).__name__}, not a torch.nn.Module")
    heads = _heads(name, module, num_classes, given_classes="num_classes" in arguments, seed=seed)
    _check_output(name, module, num_classes, image_size)
    return module, heads, "image_size" in arguments


def _heads(name: str, module: nn.Module, num_classes: int, *, given_classes: bool, seed: int) -> tuple[str, ...]:
    """Paths of the classifier layers: as the network says, else its last linear layer, which may be replaced."""
    named = _named_groups(name, module).get(HEAD)
    remedy = f'name the classifier in layer_groups["{HEAD}"] of the network'
    try:
        paths = named or (find_head(module),)
        layers = [module.get_submodule(path) for path in paths]
    except (IndexError, AttributeError):
        raise UserError(f"model.name={name}: no linear layer or convolution is its classifier; {remedy}") from None
    if not given_classes:
        try:
            with seeded(seed, "model"):
                for path in paths:
                    replace_head(module, path, num_classes)
        except TypeError as error:
            raise UserError(f"model.name={name}: {error}; {remedy}") from error
        return paths
    sizes = [layer.weight.shape[0] if isinstance(layer, (nn.Linear, nn.Conv2d)) else None for layer in layers]
    if set(sizes) != {num_classes}:
        last = " ".join(["its last layer", *([", ".join(paths)] if any(paths) else [])])
        raise UserError(
            f"model.name={name}: it was called with num_classes={num_classes}, but {last} has "
            f"{', '.join(map(str, sizes))} outputs; {remedy}"
        )
    return paths


def _check_output(name: str, module: nn.Module, num_classes: int, size: int) -> None:
    """Refuse a network whose output is something else than logits; that its code fails is found later."""
    device = next(module.parameters()).device
    for mode in (False, True):
        with torch.no_grad(), preserve_state(module, device):
            module.train(mode)
            try:
                output = module(torch.zeros(2, 3, size, size, device=device))
            except Exception:  # for images of this size, or on the device `meta`
                return
        if not isinstance(output, Tensor) or tuple(output.shape) != (2, num_classes):
            what = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            when = "training" if mode else "evaluation"
            raise UserError(
                f"model.name={name}: for 2 images and {num_classes} classes its output in {when} is {what}; it must be "
                f"logits [2, {num_classes}]"
            )


def _named_groups(name: str, module: nn.Module) -> dict[str, tuple[str, ...]]:
    """`layer_groups` of a network, a mapping from names to paths from stem to head; empty if it has none."""
    groups = getattr(module, "layer_groups", None)
    if groups is None:
        return {}
    if not isinstance(groups, Mapping) or not groups:
        raise UserError(
            f'model.name={name}: layer_groups must be a mapping such as {{"stem": ["conv1"], "head": ["fc"]}}'
        )
    return {str(key): (paths,) if isinstance(paths, str) else tuple(paths) for key, paths in groups.items()}


def groups(name: str, module: nn.Module, head: tuple[str, ...]) -> tuple[LayerGroup, ...]:
    """The groups that the network names, else those of its family in torchvision or timm, else one for each child.

    Raises:
        UserError: the groups that it names are not a partition of its parameters.
    """
    named = {key: paths for key, paths in _named_groups(name, module).items() if key != HEAD}
    if named:
        found = (*(LayerGroup(key, paths) for key, paths in named.items()), LayerGroup(HEAD, head))
        try:
            groups_of_parameters(module, found)
        except ValueError as error:
            raise UserError(f"model.name={name}: layer_groups: {error}") from error
        return found
    for rule in (timm_models.groups if hasattr(module, "group_matcher") else torchvision_groups, _by_child):
        try:
            found = rule(module, head)
            groups_of_parameters(module, found)
        except Exception:  # a rule is for networks as their library builds them
            continue
        return found
    raise UserError(f"model.name={name}: its parameters can't be divided into layer groups; give it layer_groups")


def _by_child(module: nn.Module, head: tuple[str, ...]) -> tuple[LayerGroup, ...]:
    return groups_from_parts(module, parameters_by_child(module), head)


def preprocess(name: str, module: nn.Module | None = None) -> Preprocess:
    """The attribute `preprocess` of the function, or of timm's network; else ImageNet's at 224 px.

    Raises:
        UserError: it has other keys or values.
    """
    values = getattr(callable_of(name), "preprocess", None)
    if values is None:
        config = getattr(module, "pretrained_cfg", None) or {}
        values = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct") if config.get(key)}
        if values.get("interpolation") not in _INTERPOLATIONS:
            values.pop("interpolation", None)
    if not isinstance(values, Mapping) or set(values) - set(_KEYS):
        raise UserError(f"model.name={name}: its preprocess must be a mapping with the keys {', '.join(_KEYS)}")
    default = Preprocess()
    size = values.get("image_size", default.crop_size)
    share = values.get("crop_pct", default.crop_size / default.resize_size)
    interpolation = values.get("interpolation", default.interpolation)
    try:
        (r, g, b), (sr, sg, sb) = (map(float, values.get(key, getattr(default, key))) for key in ("mean", "std"))
        usable = min(sr, sg, sb) > 0 and 0 < share <= 1 and interpolation in _INTERPOLATIONS
        resized = round(size / share)
    except (TypeError, ValueError):
        usable = False
    if not usable or isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(
            f"model.name={name}: in its preprocess, mean and std are three numbers for pixels in 0..1, image_size is "
            f"in pixels, crop_pct is above 0 and at most 1, interpolation is one of {', '.join(_INTERPOLATIONS)}"
        )
    return Preprocess((r, g, b), (sr, sg, sb), interpolation, size, resized)


def source_digest(module: nn.Module) -> str:
    """A digest of the source files of the network's classes, for what depends on its code."""
    digest = hashlib.sha256()
    for path in sorted({type(part).__module__ for part in module.modules()}):
        if path.partition(".")[0] in _LIBRARIES:
            continue
        file = getattr(sys.modules.get(path), "__file__", None)
        digest.update(f"{path}\0".encode() + (Path(file).read_bytes() if file and Path(file).is_file() else b""))
    return digest.hexdigest()
