"""timm classifiers. timm is an optional dependency, imported only if it is needed."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distil_tl.models.head import seeded
from distil_tl.models.layer_groups import LayerGroup, groups_from_parts, has_prefix, parameters_by_child
from distil_tl.models.names import INSTALL_TIMM, TIMM_PREFIX
from distil_tl.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from distil_tl.models.weights import StateDict
from distil_tl.utils.errors import UserError, did_you_mean, listed
from distil_tl.utils.import_path import is_installed
from distil_tl.utils.log import logger

# Those that torchvision supports for tensors; timm also has others.
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def installed() -> bool:
    """Whether timm is installed; does not import it."""
    return is_installed("timm")


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"model.name starts with {TIMM_PREFIX}, but timm cannot be imported ({error}): {INSTALL_TIMM}"
        ) from error
    return timm  # type: ignore[no-any-return]


def names() -> list[str]:
    """Names of timm's architectures, without tags and without the `timm/` prefix."""
    return list(_timm().list_models())


def names_with_tags() -> list[str]:
    """Names of timm's architectures with each of their sets of weights, as NAME.TAG."""
    return list(_timm().list_pretrained())


def published_as(name: str) -> tuple[int, str, str]:
    """The image size, the tag and the place of the weights for a name; tag and place are empty if there are none.

    The place is a repository of the Hugging Face hub, or the name of a file in torch.hub's cache.
    """
    config = _timm().models.get_pretrained_cfg(name)
    size = preprocess(name).crop_size
    if not config or not config.has_weights:
        return size, "", ""
    url = config.url[0] if isinstance(config.url, tuple) else config.url or ""
    return size, config.tag or "default", config.hf_hub_id or url.rpartition("/")[2]


def name_problem(name: str) -> str | None:
    """The message for an invalid timm name; None for a valid one, ARCHITECTURE or ARCHITECTURE.TAG."""
    timm = _timm()
    if not timm.is_model(name):
        suggestion = did_you_mean(TIMM_PREFIX + name.partition(".")[0], [TIMM_PREFIX + valid for valid in names()])
        return f"timm has no model {name!r}{suggestion}"
    architecture, _, tag = name.partition(".")
    tags = [full_name.partition(".")[2] for full_name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        valid = ", ".join(tags) or "none"
        return f"timm has no weights {tag!r} of {architecture}{did_you_mean(tag, tags)} (valid are {valid})"
    return None


def has_weights(name: str) -> bool:
    """Whether timm has pretrained weights for this name."""
    return bool(_timm().models.is_model_pretrained(name))


def preprocess(name: str) -> Preprocess:
    """The preprocessing that timm's weights for this name expect; read without network access."""
    timm = _timm()
    published = timm.models.get_pretrained_cfg(name)
    config = timm.data.resolve_data_config(pretrained_cfg=published.to_dict() if published else {}, args={})
    mean, std = tuple(config["mean"]), tuple(config["std"])
    crop = config["input_size"][-1]
    interpolation = config["interpolation"]
    return Preprocess(
        mean=mean if len(mean) == 3 else IMAGENET_MEAN,
        std=std if len(std) == 3 else IMAGENET_STD,
        interpolation=interpolation if interpolation in _INTERPOLATIONS else "bicubic",
        crop_size=crop,
        resize_size=math.floor(crop / config["crop_pct"]),
    )


def build(
    name: str, num_classes: int, image_size: int, *, pretrained: bool, seed: int, drops: Mapping[str, float]
) -> tuple[nn.Module, tuple[str, ...], bool]:
    """The model with a new, not yet initialised head, the paths of the head, and whether the image size is fixed.

    Transformers with dynamic image sizes are built with them, other transformers for `image_size` only.

    Args:
        drops: arguments for dropout and stochastic depth.

    Raises:
        UserError: the weights cannot be loaded, the model is not a classifier, or it does not support `image_size`.
    """
    options = arguments(name, image_size)
    with seeded(seed, "model"):
        module = _create(name, pretrained, num_classes=num_classes, **options, **drops)
    check_size(name, module, image_size)
    return module, _heads(name, module, num_classes), "img_size" in options


def arguments(name: str, image_size: int) -> dict[str, object]:
    """Arguments of timm's `create_model` besides the number of classes."""
    accepted = _constructor_arguments(name)
    if "dynamic_img_size" in accepted:
        return {"dynamic_img_size": True}
    return {"img_size": image_size} if "img_size" in accepted else {}


def accepts(name: str, argument: str) -> bool:
    """Whether a model is built with an argument of this name."""
    return argument in _constructor_arguments(name)


def _constructor_arguments(name: str) -> set[str]:
    """Names of the arguments of the model's class and its bases. Only an instance tells which class it is."""
    with torch.device("meta"):
        probe = _timm().create_model(name, pretrained=False)
    arguments: set[str] = set()
    for base in type(probe).__mro__:
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        arguments |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return arguments


def _create(name: str, pretrained: bool, **options: object) -> nn.Module:
    timm = _timm()
    if not pretrained:
        return timm.create_model(name, pretrained=False, **options)  # type: ignore[no-any-return]
    try:
        return timm.create_model(name, pretrained=True, **options)  # type: ignore[no-any-return]
    # Errors of the hub's client have no common base class: OSError, httpx errors, its own.
    except Exception as error:
        with torch.device("meta"):  # raises where the architecture can't be built, say for this image size
            timm.create_model(name, pretrained=False, **options)
        published = timm.models.get_pretrained_cfg(name)
        origin = published and (published.hf_hub_id or published.url)
        raise UserError(
            f"model.weights: timm could not load its weights for {name} from {origin} "
            f"({type(error).__name__}: {error}). Run `distil-tl prefetch` with the same arguments on a machine "
            f"with network that shares this cache (HF_HOME), or set model.weights=PATH to a .safetensors or .pth file"
        ) from error


def check_size(name: str, module: nn.Module, size: int) -> None:
    """Raise UserError if the model does not support images with this side in pixels."""
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    step = patch[0] if isinstance(patch, (tuple, list)) else patch
    if isinstance(step, int) and size % step:
        below = size // step * step
        sizes = " or ".join(str(multiple) for multiple in (below, below + step) if multiple)
        raise UserError(
            f"data.image_size={size} does not fit {TIMM_PREFIX}{name}: use a multiple of {step}, such as {sizes}"
        )


def adapt_state_dict(state: StateDict, module: nn.Module, skip: tuple[str, ...], name: str) -> StateDict:
    """`state` as timm itself adapts its pretrained weights: position embeddings of another image size are resized.

    Args:
        skip: paths that are not loaded, whose shapes may differ.
    """
    expected = {key: value for key, value in module.state_dict().items() if not has_prefix(key, skip)}
    adapt = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if adapt is None or all(key in state and state[key].shape == value.shape for key, value in expected.items()):
        return state
    try:
        with torch.no_grad():
            adapted: StateDict = adapt(dict(state), module)
    except Exception:  # weights of another architecture, which are refused with the names of their tensors
        return state
    resized = [
        f"{key} {list(state[key].shape)} to {list(value.shape)}"
        for key, value in adapted.items()
        if key in state and key in expected and value.shape != state[key].shape
    ]
    if resized:
        logger.info(
            "model.weights: resized to this model, as timm does: %s%s", listed(resized, 5), _own_size(state, name)
        )
    return adapted


def _own_size(state: StateDict, name: str) -> str:
    """A hint at the model of the same family whose position embeddings have the size of those in a file."""
    family = re.sub(r"_\d+(\..*)?$", "", name)
    for other in names() if "pos_embed" in state else ():
        if re.fullmatch(re.escape(family) + r"_\d+", other):
            with torch.device("meta"):
                embedding = getattr(_timm().create_model(other, pretrained=False), "pos_embed", None)
            if embedding is not None and embedding.shape == state["pos_embed"].shape:
                return f"; model.name={TIMM_PREFIX}{other} keeps them as they are"
    return ""


def _heads(name: str, module: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Paths of the classifier layers; models trained with distillation have two."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    listed = config.get("classifier") or ()
    paths = (listed,) if isinstance(listed, str) else tuple(listed)
    modules = dict(module.named_modules())
    layers = [modules.get(path) for path in paths]
    valid = [isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) == num_classes for layer in layers]
    if not valid or not all(valid):
        raise UserError(
            f"model.name: {TIMM_PREFIX}{name} has no classifier to replace; choose an image classifier of timm"
        )
    return paths


def groups(module: nn.Module, head: tuple[str, ...]) -> tuple[LayerGroup, ...]:
    """Groups of a timm model: the coarse groups that timm defines, else one group for each top-level child."""
    from timm.models import group_parameters

    try:
        parts = group_parameters(module, module.group_matcher(coarse=True))  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError):
        return groups_from_parts(module, parameters_by_child(module), head)
    return groups_from_parts(module, [parts[index] for index in sorted(parts)], head)


def source(name: str) -> str:
    """The name of timm's weights in records, such as "timm resnet18.a1_in1k"."""
    published = _timm().models.get_pretrained_cfg(name)
    return f"timm {published.architecture}.{published.tag}" if published and published.tag else f"timm {name}"


def download(name: str) -> None:
    """Download timm's weights for this name into the Hugging Face cache if they are missing.

    Raises:
        UserError: the download failed.
    """
    _create(name, pretrained=True)


def cached_file(name: str) -> Path | None:
    """The file of timm's weights in the Hugging Face cache, None if it is missing."""
    published = _timm().models.get_pretrained_cfg(name)
    if not published or not published.hf_hub_id:
        return None
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = published.hf_hub_id.partition("@")
    candidates = [published.hf_hub_filename, "model.safetensors", "pytorch_model.bin"]
    for filename in filter(None, candidates):
        cached = try_to_load_from_cache(repository, filename, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    return None
