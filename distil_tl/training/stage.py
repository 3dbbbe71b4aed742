"""Freezing as a pure function of (model, stage), and a stage with its settings resolved."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distil_tl.data.augmentation import Augment
from distil_tl.data.mixing import Mixing
from distil_tl.training.config import OptimConfig, SearchConfig, StageConfig, wants_features
from distil_tl.utils.args import refuse
from distil_tl.utils.errors import UserError, did_you_mean
from distil_tl.utils.log import logger

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel


@dataclass(frozen=True)
class Stage:
    """One stage of a run, with every setting resolved that its configuration leaves to a default.

    Attributes:
        name: as in `stages.NAME`.
        config: its own section; the learning rate is the one that a head search chose, if there was one.
        optim: the section `optim`, likewise with the weight decay that was chosen.
        image_size: pixels.
        augment: as `data.augment`.
        seed: of the run.
        precision: `precision` of the run.
        compile, compile_mode, metric: of the run.
        balance: `data.balance`.
    """

    name: str
    config: StageConfig
    optim: OptimConfig
    image_size: int
    augment: Augment
    seed: int
    precision: str
    compile: str
    compile_mode: str = "default"
    metric: str = "top1"
    balance: str = "none"

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether torch.compile replays the trained network as CUDA graphs."""
        return self.compile == "all" and self.compile_mode != "default"

    @property
    def mixing(self) -> Mixing | None:
        config = self.config
        epochs = config.epochs - config.mix_off_epochs
        return Mixing(config.mixup, config.cutmix, epochs) if config.mixes and epochs > 0 else None

    @property
    def wants_features(self) -> bool:
        return wants_features(self.config, self.augment)

    def with_search_result(self, result: dict[str, Any] | None) -> Stage:
        """The stage with the learning rate and weight decay that a head search chose, and no search left to do."""
        if result is None:
            return self
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, lr=result["lr"], search=SearchConfig()),
            optim=dataclasses.replace(self.optim, weight_decay=result["weight_decay"]),
        )


def trainable_groups(unfreeze: Any, names: list[str], key: str = "unfreeze") -> frozenset[int]:
    """Indices of the groups that `unfreeze` trains, for groups `names` from stem to head.

    Raises:
        UserError: the model has no group of that name, or fewer groups than asked for.
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
    """Refuse what can only be checked against the built model. One trial image of each size goes through it.

    Raises:
        UserError: a stage unfreezes a group that the model does not have, or sets an image size it can't take.
    """
    frozen = [name for name, stage in stages.items() if stage.epochs != 0 and stage.batch_norm != "train"]
    if model.weights.source == "none" and frozen and any(isinstance(m, _NormBase) for m in model.module.modules()):
        logger.warning(
            "model.weights=none, and BatchNorm statistics are frozen in stage %s: a network with random weights hardly "
            "learns that way. Use pretrained weights, or stages.%s.batch_norm=train",
            ", ".join(frozen), frozen[0],
        )  # fmt: skip
    refuse(list(stage_problems(model, stages)))
    sizes: dict[int, str] = {}
    for name, stage in stages.items():
        if stage.epochs != 0:
            key = "data.image_size" if stage.image_size is None else f"stages.{name}.image_size"
            sizes.setdefault(stage.image_size or model.image_size, key)
    for size, key in sizes.items():
        model.try_size(size, key)


def stage_problems(model: TransferModel, stages: Mapping[str, StageConfig]) -> Iterator[str]:
    """Groups that the model does not have, and image sizes for which it is not built."""
    for name, stage in stages.items():
        try:
            trainable_groups(stage.unfreeze, list(model.group_names), f"stages.{name}.unfreeze")
        except UserError as error:
            yield str(error)
        if model.fixed_image_size and stage.image_size not in (None, model.image_size):
            yield (
                f"stages.{name}.image_size={stage.image_size}, but this model is built for {model.image_size} px; "
                f"remove it there and set data.image_size"
            )


def apply_stage(model: TransferModel, stage: StageConfig) -> None:
    """Freeze and unfreeze `model` as `stage` says: `requires_grad` by group, and the mode of every module.

    A module of a frozen group is put in evaluation mode and stays there when `model.train()` is called: its BatchNorm
    statistics do not change and its dropout is off, so the frozen part is a fixed function of its input. With
    `batch_norm: frozen` the statistics of unfrozen groups are kept too; their scales and shifts train.

    Idempotent, and independent of the stage that was applied before.
    """
    trainable = trainable_groups(stage.unfreeze, list(model.group_names))
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(model.group_of(name) in trainable)
        parameter.grad = None
    for module in model.module.modules():
        module.__dict__.pop("train", None)
    model.module.train()
    for name, module in model.module.named_modules():
        group = model.group_of(name)
        frozen = group is not None and group not in trainable
        if frozen or (stage.batch_norm == "frozen" and isinstance(module, _NormBase)):
            module.training = False
            module.__dict__["train"] = types.MethodType(_keep_mode, module)


def _keep_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `nn.Module.train` on a frozen module."""
    return module


def count_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
