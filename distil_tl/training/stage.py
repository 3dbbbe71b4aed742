"""Freezing as a pure function of (model, stage)."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distil_tl.data.config import AUGMENTATIONS
from distil_tl.models.transfer import TransferModel
from distil_tl.utils.errors import UserError, did_you_mean

BATCH_NORM = ("frozen", "train")
FEATURES = ("auto", "on", "off")


@dataclass
class SearchConfig:
    """All pairs are tried before the stage; a list that is empty stands for the value that the stage has anyway."""

    lr: list[float] = field(default_factory=list)  # to choose the stage's from, by top-1 on val; []: no search
    weight_decay: list[float] = field(default_factory=list)  # likewise, of optim.weight_decay

    @property
    def wanted(self) -> bool:
        return bool(self.lr or self.weight_decay)

    def problems(self, key: str) -> list[str]:
        found = []
        if not all(0 < lr < float("inf") for lr in self.lr):
            found.append(f"{key}.lr must hold positive numbers")
        if not all(0 <= decay < float("inf") for decay in self.weight_decay):
            found.append(f"{key}.weight_decay must hold numbers of 0 or more")
        return found


@dataclass
class StageConfig:
    unfreeze: Any = "all"  # head | all | the N last groups | [group names]
    epochs: int = 1  # 0 skips the stage
    lr: float = 1e-3  # of the head, at its highest
    layer_decay: float = 1.0  # each group below the head learns this much slower than the one above it
    batch_norm: str = "frozen"  # frozen: running statistics stay as they are | train: they move in unfrozen groups
    augment: str | None = None  # null: as data.augment
    image_size: int | None = None  # null: as data.image_size
    features: str = "auto"  # of the frozen part, computed once: on | off | auto: if all stays equal
    views: int | None = None  # augmented views of each image to compute features of; null: one without augmentation
    search: SearchConfig = field(default_factory=SearchConfig)

    def problems(self, name: str) -> list[str]:
        found = []
        key = f"stages.{name}"
        if not _is_unfreeze(self.unfreeze):
            found.append(
                f"{key}.unfreeze is {self.unfreeze!r}; give `head`, `all`, a number of last groups (1 is the head "
                f"alone), or a list of group names"
            )
        if self.epochs < 0:
            found.append(f"{key}.epochs must be 0 (skip the stage) or more")
        if not 0 < self.lr < float("inf"):
            found.append(f"{key}.lr must be a positive number")
        if not 0 < self.layer_decay <= 1:
            found.append(f"{key}.layer_decay must be above 0 and at most 1")
        if self.batch_norm not in BATCH_NORM:
            found.append(f"{key}.batch_norm is {self.batch_norm!r}; choose one of {', '.join(BATCH_NORM)}")
        if self.augment is not None and self.augment not in AUGMENTATIONS:
            found.append(f"{key}.augment is {self.augment!r}; choose one of {', '.join(AUGMENTATIONS)}")
        if self.features not in FEATURES:
            found.append(f"{key}.features is {self.features!r}; choose one of {', '.join(FEATURES)}")
        if self.views is not None and self.views < 1:
            found.append(f"{key}.views must be at least 1, or null")
        if self.unfreeze == "all" and (self.features == "on" or self.views is not None):
            found.append(f"{key} trains everything, so it can't have features; leave out {key}.features and views")
        if self.image_size is not None and self.image_size < 8:
            found.append(f"{key}.image_size must be at least 8 pixels")
        return found + self.search.problems(f"{key}.search")


def default_stages() -> dict[str, StageConfig]:
    """A new head on the frozen backbone, then everything."""
    return {
        "head": StageConfig(unfreeze="head", epochs=3, lr=1e-2),
        "full": StageConfig(unfreeze="all", epochs=5, lr=3e-4, layer_decay=0.9),
    }


def wants_features(stage: StageConfig, augment: str) -> bool:
    """Whether a stage's settings ask for features; `auto` does where the result is the same with and without."""
    if stage.features == "auto":
        return stage.unfreeze != "all" and (augment == "none" or stage.views is not None)
    return stage.features == "on"


def _is_unfreeze(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value >= 1
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(name, str) for name in value)
    return value in ("head", "all")


def trainable_groups(unfreeze: Any, names: list[str], key: str = "unfreeze") -> frozenset[int]:
    """Indices of the groups that `unfreeze` trains, for groups `names` from stem to head.

    Raises:
        UserError: for a name that the model has not, or more groups than it has.
    """
    if unfreeze == "head":
        return frozenset({len(names) - 1})
    if unfreeze == "all":
        return frozenset(range(len(names)))
    if isinstance(unfreeze, int):
        if unfreeze > len(names):
            raise UserError(f"{key}={unfreeze}, but the model has {len(names)} groups: {', '.join(names)}")
        return frozenset(range(len(names) - unfreeze, len(names)))
    unknown = [name for name in unfreeze if name not in names]
    if unknown:
        raise UserError(
            f"{key} names {', '.join(unknown)}{did_you_mean(unknown[0], names) or ';'} "
            f"the model's groups are {', '.join(names)}"
        )
    return frozenset(names.index(name) for name in unfreeze)


def check_stages(model: TransferModel, stages: Mapping[str, StageConfig]) -> None:
    """What only the built model can tell.

    Raises:
        UserError: a stage unfreezes groups that the model has not, or changes an image size that is built in.
    """
    for name, stage in stages.items():
        trainable_groups(stage.unfreeze, list(model.group_names), f"stages.{name}.unfreeze")
        if model.fixed_image_size and stage.image_size not in (None, model.image_size):
            raise UserError(
                f"stages.{name}.image_size={stage.image_size}, but this model is built for {model.image_size} px; "
                f"leave it out there and set data.image_size"
            )
        if stage.image_size is not None:
            model.check_size(stage.image_size)


def apply_stage(model: TransferModel, stage: StageConfig) -> None:
    """Make `model` what `stage` trains: `requires_grad` by group, and the mode of every module.

    A module of a frozen group is put in evaluation mode and stays there, whoever calls `model.train()` later: its
    BatchNorm statistics do not move and its dropout is off, so the frozen part is a fixed function of its input.
    With `batch_norm: frozen` the statistics of unfrozen groups stay too; their scales and shifts train.

    Idempotent, and independent of the stage that was applied before.
    """
    trainable = trainable_groups(stage.unfreeze, list(model.group_names))
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(model.group_of(name) in trainable)
        parameter.grad = None
    for _, module in model.module.named_modules():
        module.__dict__.pop("train", None)
    model.module.train()
    for name, module in model.module.named_modules():
        group = model.group_of(name)
        frozen = group is not None and group not in trainable
        if frozen or (stage.batch_norm == "frozen" and isinstance(module, _NormBase)):
            module.training = False
            module.__dict__["train"] = types.MethodType(_keep_mode, module)


def _keep_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `nn.Module.train` on a frozen module."""
    return module


def count_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
