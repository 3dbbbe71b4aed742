"""Torchvision classifiers: architectures, published weights, and the preprocessing that the weights expect."""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models as tv
from torchvision.models.vision_transformer import interpolate_embeddings

from distil_tl.models.head import find_head, replace_head, seeded
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.weights import StateDict, renamed
from distil_tl.utils.errors import UserError

# GoogLeNet and Inception. Their published weights were trained on inputs scaled to -1..1, to which the model itself
# rescales where `transform_input` is set.
_WITH_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def names() -> list[str]:
    """Names of torchvision's image classifiers."""
    return list(tv.list_models(module=tv))


def weights_names(name: str) -> list[str]:
    """Names of the published weights of a model, such as IMAGENET1K_V2."""
    return [weights.name for weights in tv.get_model_weights(name)]


def published_weights(name: str, weights: str) -> Any:
    """Torchvision's entry for the weights named `weights`; the default one if there is none of this name."""
    published = tv.get_model_weights(name)
    return published[weights] if weights in published.__members__ else published.DEFAULT


def published_as(name: str) -> tuple[str, str]:
    """The name of the default weights of a model, and that of their file in torch.hub's cache."""
    published = published_weights(name, "default")
    return published.name, published.url.rpartition("/")[2]


def preprocess(name: str, weights: str) -> Preprocess:
    """The preprocessing that the published weights of a model expect."""
    preset = published_weights(name, weights).transforms()
    return Preprocess(
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_size=preset.crop_size[0],
        resize_size=preset.resize_size[0],
    )


def fixed_size(name: str) -> bool:
    """Whether the architecture is built for one image size, by its position embeddings or partitions."""
    return name.startswith(("vit_", "maxvit"))


def build(
    name: str, num_classes: int, image_size: int, *, random: bool, seed: int, drops: Mapping[str, float]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The architecture without auxiliary classifiers and with a new, not yet initialised head; the head's path.

    Args:
        random: whether the random weights stay, as no others will be loaded.
        drops: arguments for dropout and stochastic depth.

    Raises:
        UserError: the architecture does not support `image_size`.
    """
    check_size(name, image_size)
    with seeded(seed, "model"):
        module = _create(name, **arguments(name, image_size, random=random), **drops)
        head = find_head(module)
        replace_head(module, head, num_classes)
    return module, (head,)


def _create(name: str, **options: Any) -> nn.Module:
    """The architecture with random weights. RegNet computes its widths with tensors, so they need values."""
    with _ValuesOnCpu() if name.startswith("regnet") else contextlib.nullcontext():
        module: nn.Module = tv.get_model(name, weights=None, **options)
    return module


class _ValuesOnCpu(TorchFunctionMode):
    """Puts tensors of given values on the CPU where a network is built on the device `meta`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = dict(kwargs or {})
        if func is torch.arange or (func is torch.tensor and isinstance(args[0], list)):
            given["device"] = "cpu"
        return func(*args, **given)


def arguments(name: str, image_size: int, *, random: bool) -> dict[str, object]:
    """Arguments of torchvision's constructor besides the number of classes; `random` as for `build`."""
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit"):
        return {"input_size": (image_size, image_size)}
    if name in _WITH_AUXILIARY:
        return {"aux_logits": False, "init_weights": random, "transform_input": not random}
    return {}


def accepts(name: str, argument: str) -> bool:
    """Whether a model is built with an argument of this name; the builders of some set it themselves."""
    try:
        with torch.device("meta"):
            _create(name, **arguments(name, 224, random=False), **{argument: 0.1})
    except TypeError:
        return False
    return True


def check_size(name: str, size: int) -> None:
    """Raise UserError if the architecture does not support images with this side in pixels."""
    step = 1
    if name.startswith("vit_"):
        step = int(name.rpartition("_")[2])
    elif name.startswith("maxvit"):
        step = 224
    if size < step or size % step:
        below = size // step * step
        sizes = " or ".join(str(multiple) for multiple in (below, below + step) if multiple)
        raise UserError(f"data.image_size={size} does not fit {name}: use a multiple of {step}, such as {sizes}")
    smallest = tv.get_model_weights(name).DEFAULT.meta["min_size"][0]
    # Swin pads to its windows: the minimum size in its metadata is only the size that it was trained at.
    if size < smallest and not fixed_size(name) and not name.startswith("swin"):
        raise UserError(f"data.image_size={size} is too small for {name}: use at least {smallest}")


def auxiliary_classifiers(name: str) -> tuple[str, ...]:
    """Paths of the auxiliary classifiers that weights files may contain and `build` leaves out."""
    return _WITH_AUXILIARY.get(name, ())


def adapt_state_dict(state: StateDict, module: nn.Module) -> StateDict:
    """`state` with the names and position embeddings of `module`.

    The published weights of DenseNet have the parameter names of an older torchvision. Position embeddings are
    interpolated to the image size that a vision transformer was built for.

    Raises:
        UserError: the position embeddings cannot be interpolated.
    """
    if isinstance(module, tv.DenseNet):
        return renamed(state, {key: _OLD_DENSENET_NAME.sub(r"\1\2", key) for key in state})
    if isinstance(module, tv.VisionTransformer) and "encoder.pos_embedding" in state:
        try:
            resized: StateDict = interpolate_embeddings(module.image_size, module.patch_size, OrderedDict(state))
        except ValueError as error:
            raise UserError(f"model.weights: the position embeddings cannot be resized: {error}") from error
        return resized
    return state


def cache_path(name: str, weights: str) -> Path:
    """The path of the published weights in torch.hub's cache, whether or not the file exists."""
    url: str = published_weights(name, weights).url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def published_digest(path: Path) -> str | None:
    """The first characters of a published file's SHA-256, which are part of its name."""
    match = re.search(r"-([0-9a-f]{8,})\.", path.name)
    return match[1] if match else None


def download(name: str, weights: str) -> Path:
    """The path of the published weights in torch.hub's cache, downloaded if they are missing.

    Raises:
        UserError: the download failed.
    """
    published = published_weights(name, weights)
    url: str = published.url
    path = cache_path(name, weights)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), published_digest(path), progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: the weights {published.name} of {name} could not be downloaded from "
            f"{url} to {path} ({error}). Run `distil-tl prefetch` with the same arguments on a machine with network "
            f"that shares this cache (TORCH_HOME), copy the file there, or set model.weights=PATH"
        ) from error
    return path
