"""A pretrained backbone with a new head, its layer groups and its preprocessing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from distil_tl.models import drops, own_models, timm_models, torchvision_models
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.models.fitted_heads import new_head
from distil_tl.models.layer_groups import LayerGroup, groups_of_modules, groups_of_parameters
from distil_tl.models.names import LINEAR
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.readout import ReadOut, set_readouts
from distil_tl.models.size_trial import failure_at, first_line, size_error
from distil_tl.models.torchvision_groups import torchvision_groups
from distil_tl.models.weight_sources import WeightsInfo, load_weights
from distil_tl.utils.errors import UserError


@dataclass
class TransferModel:
    """A classifier for staged training.

    Attributes:
        module: normalised images [N, 3, H, W] to logits [N, num_classes], on the CPU, in training mode.
        groups: a partition of the parameters from stem to head; the last one is always "head".
        preprocess: the preprocessing that the weights expect.
        weights: their source.
        image_size: side in pixels of the images that it was built for.
        fixed_image_size: whether it supports images of this size only.
        check_size: raises UserError for an image size that its family is known not to support.
        name: as in `model.name`.
        columns: of the head's inputs, the first one and the one after the last, by read-out; empty for pooled alone.
        parameter_groups: for each parameter, by name, the index of its group.
        module_groups: for each module, by path, the index of its group; None for a module with several groups.
    """

    module: nn.Module
    groups: tuple[LayerGroup, ...]
    preprocess: Preprocess
    weights: WeightsInfo
    image_size: int
    fixed_image_size: bool
    check_size: Callable[[int], None] = field(repr=False, default=lambda size: None)
    name: str = ""
    columns: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameter_groups: dict[str, int] = field(init=False, repr=False)
    module_groups: dict[str, int | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.parameter_groups = groups_of_parameters(self.module, self.groups)
        self.module_groups = groups_of_modules(self.module, self.parameter_groups)

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the classifier layers: one, or two in timm models trained with distillation."""
        return self.groups[-1].prefixes

    def try_size(self, size: int, key: str) -> None:
        """Check an image size with one trial image. Raises UserError with sizes that work; `key` is where it is set."""
        self.check_size(size)
        if (reason := failure_at(self.module, size)) is not None:
            raise _size_error(key, self.name, size, reason, self.preprocess)

    def group_of(self, name: str) -> int | None:
        """Index into `groups` for the dotted name of a parameter, buffer or module.

        None for a module with several groups, and for a buffer directly in such a module.

        Raises:
            KeyError: there is no parameter, buffer or module of this name.
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
    config: ModelConfig,
    num_classes: int,
    *,
    image_size: int | None,
    seed: int,
    pretrained: bool = True,
    readouts: Sequence[str] | None = None,
    head_kind: str = LINEAR,
) -> TransferModel:
    """Build the model on the CPU: the same bytes on every rank, without changing the state of global generators.

    Args:
        config: which network and weights.
        num_classes: outputs of the new head.
        image_size: side of the images in pixels; None for the size that the weights were evaluated at.
        seed: determines all random weights. Those of the head do not depend on the backbone's weights.
        pretrained: False builds the same architecture without reading the weights, which may be missing on this
            machine; the caller loads a checkpoint.
        readouts: several read-outs side by side, in place of the configured one.
        head_kind: as `network_head` of the stages says.

    Raises:
        UserError: the configuration, the weights or the image size are invalid.
    """
    problems = config.problems() if pretrained else config.name_problems()
    if problems:
        raise UserError("\n".join(problems))
    preprocess = default_preprocess(config)
    size = image_size if image_size is not None else preprocess.crop_size

    try:
        module, head, fixed = _build_module(config, num_classes, size, seed, pretrained=pretrained)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the code of some models fails while they are built for a size
        raise _size_error("data.image_size", config.name, size, first_line(error), preprocess) from error
    read = ReadOut()
    if (wanted := readouts or [config.readout]) != ["pooled"]:
        again = functools.partial(_on_meta, config.name, size)
        read = set_readouts(config.name, module, _parts(config, module, head)[1], wanted, num_classes, size, again)
    skip, groups, check_size = _parts(config, module, head)
    skip = (*skip, *read.removed)
    if config.is_own:
        preprocess = own_models.preprocess(config.name, module)

    info = load_weights(config, module, head, skip, seed) if pretrained else WeightsInfo("unread", None)
    new_head(config.name, module, head, head_kind, seed)
    return TransferModel(module.train(), groups, preprocess, info, size, fixed, check_size, config.name, read.columns)


def _build_module(
    config: ModelConfig, num_classes: int, size: int, seed: int, *, pretrained: bool
) -> tuple[nn.Module, tuple[str, ...], bool]:
    """The architecture, with its weights if timm's own are wanted; the paths of its head; whether its size is fixed."""
    weights, chosen = resolve_weights(config), drops.arguments(config)
    if config.is_own:
        return own_models.build(
            config.name, num_classes, size, pretrained=pretrained and weights == "default", seed=seed
        )
    if config.from_timm:
        from_library = pretrained and weights == "default"
        return timm_models.build(
            config.library_name, num_classes, size, pretrained=from_library, seed=seed, drops=chosen
        )
    module, head = torchvision_models.build(
        config.name, num_classes, size, random=weights == "none", seed=seed, drops=chosen
    )
    return module, head, torchvision_models.fixed_size(config.name)


def _on_meta(name: str, size: int) -> tuple[nn.Module, tuple[LayerGroup, ...]]:
    """The network without values and its layer groups."""
    config = ModelConfig(name, "none")
    with torch.device("meta"):
        module, head, _ = _build_module(config, 2, size, 0, pretrained=False)
    return module, _parts(config, module, head)[1]


def _parts(
    config: ModelConfig, module: nn.Module, head: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[LayerGroup, ...], Callable[[int], None]]:
    """The paths whose weights are not loaded, the layer groups, and the check of an image size."""
    if config.is_own:
        return head, own_models.groups(config.name, module, head), lambda size: None
    if config.from_timm:
        check = functools.partial(timm_models.check_size, config.library_name, module)
        return head, timm_models.groups(module, head), check
    skip = (*head, *torchvision_models.auxiliary_classifiers(config.name))
    return skip, torchvision_groups(module, head), functools.partial(torchvision_models.check_size, config.name)


def _size_error(key: str, name: str, size: int, reason: str, preprocess: Preprocess) -> UserError:
    return size_error(key, name, size, reason, preprocess.crop_size, lambda other: _on_meta(name, other)[0])


def default_preprocess(config: ModelConfig) -> Preprocess:
    """The preprocessing that the weights expect; for `none` and paths, that of the model's default weights."""
    if config.is_own:
        return own_models.preprocess(config.name)
    if config.from_timm:
        return timm_models.preprocess(config.library_name)
    return torchvision_models.preprocess(config.name, resolve_weights(config))
