"""Classifiers of timm, an optional extra imported only when a model of it is asked for."""

from __future__ import annotations

import importlib.util
import inspect
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distil_tl.models.head import seeded
from distil_tl.models.layer_groups import LayerGroup, groups_from_parameters, top_level_parts
from distil_tl.models.names import TIMM_PREFIX
from distil_tl.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from distil_tl.utils.errors import UserError, did_you_mean

INSTALL = "pip install 'distil_tl[timm]'"
# What torchvision can resize tensors with; timm knows others.
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def installed() -> bool:
    """Whether timm can be imported; it is not."""
    return importlib.util.find_spec("timm") is not None


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"model.name starts with {TIMM_PREFIX}, but timm cannot be imported ({error}): {INSTALL}"
        ) from error
    return timm  # type: ignore[no-any-return]


def names() -> list[str]:
    """Names of timm's architectures, without tags and without the `timm/` in front."""
    return list(_timm().list_models())


def name_problem(name: str) -> str | None:
    """What is wrong with a timm name, ARCHITECTURE or ARCHITECTURE.TAG; None if nothing is."""
    timm = _timm()
    if not timm.is_model(name):
        near = did_you_mean(TIMM_PREFIX + name.partition(".")[0], [TIMM_PREFIX + known for known in names()])
        return f"timm has no model {name!r}{near}"
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        return f"timm has no weights {tag!r} of {architecture}{did_you_mean(tag, tags)} (known are {known})"
    return None


def has_weights(name: str) -> bool:
    """Whether timm publishes weights for this name."""
    return bool(_timm().models.is_model_pretrained(name))


def preprocess(name: str) -> Preprocess:
    """What timm's weights for this name expect of their input; known without network."""
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
    name: str, num_classes: int, image_size: int, *, pretrained: bool, seed: int
) -> tuple[nn.Module, tuple[str, ...], bool]:
    """The model with its head to be initialised, the head's paths, and whether the size is fixed.

    Transformers that can take images of any size at run time are built so, others for `image_size`.

    Raises:
        UserError: the weights cannot be had, the model is no classifier, or it cannot take such images.
    """
    accepted = _constructor_parameters(name)
    options: dict[str, object] = {}
    if "dynamic_img_size" in accepted:
        options["dynamic_img_size"] = True
    elif "img_size" in accepted:
        options["img_size"] = image_size
    with seeded(seed, "model"):
        module = _create(name, pretrained, num_classes=num_classes, **options)
    check_size(name, module, image_size)
    return module, _heads(name, module, num_classes), "img_size" in options


def _constructor_parameters(name: str) -> set[str]:
    """Names of what the class behind `name` and its bases take, which timm tells only through an instance."""
    with torch.device("meta"):
        probe = _timm().create_model(name, pretrained=False)
    parameters: set[str] = set()
    for base in type(probe).__mro__:
        taken = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        parameters |= set(taken)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            break
    return parameters


def _create(name: str, pretrained: bool, **options: object) -> nn.Module:
    timm = _timm()
    if not pretrained:
        return timm.create_model(name, pretrained=False, **options)  # type: ignore[no-any-return]
    try:
        return timm.create_model(name, pretrained=True, **options)  # type: ignore[no-any-return]
    # The hub client's failures have no common type: OSError, httpx errors, its own.
    except Exception as error:
        published = timm.models.get_pretrained_cfg(name)
        origin = published and (published.hf_hub_id or published.url)
        raise UserError(
            f"model.weights: timm could not load its weights for {name} from {origin} "
            f"({type(error).__name__}: {error}). Run `distil-tl prefetch` with the same arguments on a machine "
            f"with network that shares this cache (HF_HOME), or set model.weights=PATH to a .safetensors or .pth file"
        ) from error


def check_size(name: str, module: nn.Module, size: int) -> None:
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    step = patch[0] if isinstance(patch, (tuple, list)) else patch
    if isinstance(step, int) and size % step:
        below = size // step * step
        sizes = " or ".join(str(near) for near in (below, below + step) if near)
        raise UserError(
            f"data.image_size={size} does not suit {TIMM_PREFIX}{name}, which needs a multiple of {step}: try {sizes}"
        )


def _heads(name: str, module: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Paths of the classifier; models trained with distillation have two of them."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    listed = config.get("classifier") or ()
    paths = (listed,) if isinstance(listed, str) else tuple(listed)
    known = dict(module.named_modules())
    layers = [known.get(path) for path in paths]
    fits = [isinstance(part, (nn.Linear, nn.Conv2d)) and len(part.weight) == num_classes for part in layers]
    if not fits or not all(fits):
        raise UserError(
            f"model.name: {TIMM_PREFIX}{name} has no classifier to replace; choose an image classifier of timm"
        )
    return paths


def groups(module: nn.Module, head: tuple[str, ...]) -> tuple[LayerGroup, ...]:
    """Groups of a timm model: its own coarse ones where it has any, else its top-level children."""
    from timm.models import group_parameters

    try:
        found = group_parameters(module, module.group_matcher(coarse=True))  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError):
        return groups_from_parameters(module, top_level_parts(module), head)
    return groups_from_parameters(module, [found[index] for index in sorted(found)], head)


def source(name: str) -> str:
    """What timm's weights for this name are called in records."""
    published = _timm().models.get_pretrained_cfg(name)
    return f"timm {published.architecture}.{published.tag}" if published and published.tag else f"timm {name}"


def prepare(name: str) -> None:
    """Downloads timm's weights for this name into the Hugging Face cache if they are not there.

    Raises:
        UserError: the download failed.
    """
    _create(name, pretrained=True)


def cached_file(name: str) -> Path | None:
    """The file timm read its weights from, where the Hugging Face cache still has it."""
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
