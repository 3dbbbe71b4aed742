"""A pretrained backbone with a new head, and everything the stages need to know about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from distil_tl.models import timm_models, torchvision_models
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.models.head import init_head, seeded
from distil_tl.models.layer_groups import LayerGroup, index_modules, index_parameters
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.torchvision_groups import torchvision_groups
from distil_tl.models.weight_packages import PACKAGES
from distil_tl.models.weights import State, load_backbone, match_by_position, read_state, strip_prefixes
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import sha256_file


@dataclass(frozen=True)
class WeightsInfo:
    """Where the backbone's weights come from.

    Attributes:
        source: such as "torchvision IMAGENET1K_V2", "file run.safetensors" or "none".
        sha256: of the file they were read from, None where there is none.
    """

    source: str
    sha256: str | None


@dataclass
class TransferModel:
    """A classifier ready for staged training.

    Attributes:
        module: normalised images [N, 3, H, W] to logits [N, num_classes], on the CPU, in training mode.
        groups: a partition of the parameters from stem to head; the last one is always "head".
        preprocess: what the weights expect of their input.
        weights: where they come from.
        image_size: the side of the images it was built for.
        fixed_image_size: whether it takes images of that size only.
        check_size: raises UserError for a size of images that it can't take.
    """

    module: nn.Module
    groups: tuple[LayerGroup, ...]
    preprocess: Preprocess
    weights: WeightsInfo
    image_size: int
    fixed_image_size: bool
    check_size: Callable[[int], None] = field(repr=False, default=lambda size: None)
    parameter_groups: dict[str, int] = field(init=False, repr=False)
    module_groups: dict[str, int | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.parameter_groups = index_parameters(self.module, self.groups)
        self.module_groups = index_modules(self.module, self.parameter_groups)

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the classifier layers; one, except for timm models trained with distillation."""
        return self.groups[-1].prefixes

    def group_of(self, name: str) -> int | None:
        """Index into `groups` for the dotted name of a parameter, buffer or module.

        None for a module that spans several groups, and for a buffer directly in one.

        Raises:
            KeyError: the module has nothing of this name.
        """
        if name in self.parameter_groups:
            return self.parameter_groups[name]
        if name in self.module_groups:
            return self.module_groups[name]
        owner, _, buffer = name.rpartition(".")
        if owner in self.module_groups and buffer in self.module.get_submodule(owner)._buffers:
            return self.module_groups[owner]
        raise KeyError(name)


def build(
    config: ModelConfig, num_classes: int, *, image_size: int | None, seed: int, pretrained: bool = True
) -> TransferModel:
    """Builds the model on the CPU; every rank gets the same bytes, and the global generators are left alone.

    Args:
        config: which network and weights.
        num_classes: outputs of the new head.
        image_size: side of the images, None for the one the weights were evaluated at.
        seed: the random part of the weights is a function of it, the head's whichever the weights are.
        pretrained: False leaves the weights unread: the same architecture, to be filled from a checkpoint, on a
            machine that need not have them.

    Raises:
        UserError: the configuration, the weights or the image size do not fit.
    """
    problems = config.problems() if pretrained else config.name_problems()
    if problems:
        raise UserError("\n".join(problems))
    weights = resolve_weights(config)
    preprocess = default_preprocess(config)
    size = image_size if image_size is not None else preprocess.crop_size

    if config.from_timm:
        from_library = pretrained and weights == "default"
        name = config.library_name
        module, head, fixed = timm_models.build(name, num_classes, size, pretrained=from_library, seed=seed)
        skip = head
        groups = timm_models.groups(module, head)
        check_size = functools.partial(timm_models.check_size, name, module)
    else:
        name = config.name
        module, head = torchvision_models.build(name, num_classes, size, random=weights == "none", seed=seed)
        fixed = torchvision_models.fixed_size(name)
        skip = (*head, *torchvision_models.auxiliary(name))
        groups = torchvision_groups(module, head)
        check_size = functools.partial(torchvision_models.check_size, name)

    if pretrained:
        state, info = _read_weights(config, weights, module, head)
    else:
        state, info = None, WeightsInfo("unread", None)
    if state is not None:
        state = torchvision_models.adapt_state(strip_prefixes(state, module.state_dict()), module)
        # MNASNet rebuilds its stem for weights of its first version, which draws random numbers.
        with seeded(seed, "model"):
            load_backbone(module, state, skip=skip, source=info.source)
    init_head(module, head, seed)
    return TransferModel(module.train(), groups, preprocess, info, size, fixed, check_size)


def _read_weights(
    config: ModelConfig, weights: str, module: nn.Module, head: tuple[str, ...]
) -> tuple[State | None, WeightsInfo]:
    """The state to load, None when the module has its weights already, and where they come from."""
    if weights == "none":
        return None, WeightsInfo("none", None)
    if config.path is not None:
        return read_state(config.path), WeightsInfo(f"file {config.path.name}", sha256_file(config.path))
    if weights == "package":
        package = PACKAGES[config.name]
        file = package.file()
        assert file is not None, "config.problems() has looked"
        info = WeightsInfo(f"package {package.distribution} {package.version}", sha256_file(file))
        return match_by_position(read_state(file), module, skip_shape=head, source=info.source), info
    if config.from_timm:
        cached = timm_models.cached_file(config.library_name)
        return None, WeightsInfo(timm_models.source(config.library_name), sha256_file(cached) if cached else None)
    file = torchvision_models.cached_file(config.name, weights)
    entry = torchvision_models.entry(config.name, weights)
    return read_state(file), WeightsInfo(f"torchvision {entry.name}", sha256_file(file))


def prepare_weights(config: ModelConfig) -> None:
    """Downloads the library's weights into their usual cache, so that every rank's `build` only reads.

    For one process per cache to call first. Weights that need no download cost nothing.

    Raises:
        UserError: the download failed; the message names the source and the ways out.
    """
    weights = resolve_weights(config)
    if weights in ("none", "package") or config.path is not None:
        return
    if config.from_timm:
        timm_models.prepare(config.library_name)
    else:
        torchvision_models.cached_file(config.name, weights)


def missing_weights(config: ModelConfig) -> str | None:
    """The weights that would have to be downloaded first, by name; None when they are on this machine."""
    weights = resolve_weights(config)
    if weights in ("none", "package") or config.path is not None:
        return None
    if config.from_timm:
        found = timm_models.cached_file(config.library_name)
        return None if found else timm_models.source(config.library_name)
    found = torchvision_models.cache_path(config.name, weights)
    return None if found.is_file() else f"torchvision {torchvision_models.entry(config.name, weights).name}"


def weights_file(config: ModelConfig) -> tuple[Path | None, str | None]:
    """The file that the weights are read from, if there is one, and how its SHA-256 must begin, where that is known."""
    weights = resolve_weights(config)
    if weights == "none":
        return None, None
    if config.path is not None:
        return config.path, None
    if weights == "package":
        return PACKAGES[config.name].file(), None
    if config.from_timm:
        return timm_models.cached_file(config.library_name), None
    path = torchvision_models.cache_path(config.name, weights)
    return path, torchvision_models.published_digest(path)


def default_preprocess(config: ModelConfig) -> Preprocess:
    """What the weights expect of their input; for `none` and paths, what the model's default weights do."""
    if config.from_timm:
        return timm_models.preprocess(config.library_name)
    return torchvision_models.preprocess(config.name, resolve_weights(config))
