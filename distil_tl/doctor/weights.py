"""The model and its pretrained weights: do they exist here, or where would they come from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from distil_tl.data.augmentation import Augment
from distil_tl.doctor.folders import probe_folder
from distil_tl.doctor.lines import Report, size
from distil_tl.doctor.network import reach
from distil_tl.models import torchvision_models
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.models.fitted_heads import FittedHead
from distil_tl.models.transfer import TransferModel, build
from distil_tl.models.weight_sources import missing_weights, weights_file
from distil_tl.training.config import StageConfig, wants_features
from distil_tl.training.heads.config import network_head
from distil_tl.training.stage import apply_stage, check_stages, count_trainable
from distil_tl.utils.auto import AUTO
from distil_tl.utils.files import sha256_file

if TYPE_CHECKING:
    from distil_tl.doctor.facts import Facts

__all__ = ["ModelFound", "download_problem", "judge_weights", "look_at_model", "missing_weights"]

GROUP = "model"


@dataclass
class ModelFound:
    """The size of a model.

    Attributes:
        image_size: pixels.
        parameters: number of parameters and buffers.
        trainable: the largest number of parameters that a stage trains.
        head_width: inputs of the head.
    """

    image_size: int
    parameters: int
    trainable: int
    head_width: int


def look_at_model(
    report: Report,
    config: ModelConfig,
    stages: Mapping[str, StageConfig],
    *,
    classes: int,
    image_size: int | None,
    augments: Mapping[str, Augment],
) -> ModelFound:
    """Build the model without memory for its weights, and check the stages against it.

    Raises:
        UserError: a stage or the image size does not fit the model.
    """
    with torch.device("meta"):
        model = build(config, classes, image_size=image_size, seed=0, pretrained=False, head_kind=network_head(stages))
    check_stages(model, stages)
    trainable = {}
    for name, stage in stages.items():
        apply_stage(model, stage)
        trainable[name] = count_trainable(model.module)
    found = ModelFound(
        image_size=model.image_size,
        parameters=sum(tensor.numel() for tensor in model.module.state_dict().values()),
        trainable=max(trainable.values(), default=0),
        head_width=_head_width(model),
    )
    report.ok(
        GROUP, "model.name", f"{config.name}, {found.parameters / 1e6:.1f} million parameters, {classes} classes, "
        f"images of {model.image_size} px, layer groups {', '.join(model.group_names)}",
    )  # fmt: skip
    for name, stage in stages.items():
        if stage.epochs == 0:
            continue
        features = ", on cached features if possible" if wants_features(stage, augments[name]) else ""
        report.ok(
            GROUP, f"stages.{name}", f"{'epochs: auto' if stage.epochs == AUTO else f'{stage.epochs} epochs'}, "
            f"{trainable[name] / 1e6:.2f} million parameters{features}",
        )  # fmt: skip
    return found


def _head_width(model: TransferModel) -> int:
    head = model.module.get_submodule(model.heads[0])
    return head.in_features if isinstance(head, (nn.Linear, FittedHead)) else int(getattr(head, "in_channels", 0))


def download_problem(config: ModelConfig) -> str | None:
    """Why the weights can't be downloaded to this machine; None if nothing speaks against it."""
    folder = weights_file(config)[0]
    if folder is not None and (problem := probe_folder(str(folder.parent), True).problem):
        return f"{problem}, and set TORCH_HOME to a folder that can be written to"
    if config.from_timm and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    problem = reach(weights_url(config))
    return None if problem is None else f"the server can't be reached ({problem})"


def weights_url(config: ModelConfig) -> str:
    """Where the library downloads the weights from."""
    if config.from_timm:
        return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url: str = torchvision_models.published_weights(config.name, resolve_weights(config)).url
    return url


def judge_weights(report: Report, config: ModelConfig, facts: Sequence[Facts]) -> None:
    """Lines about the weights on each node: present and undamaged, or to be downloaded."""
    remedy = (
        "run `distil-tl prefetch` with the same arguments on a machine with network that shares this cache "
        "(TORCH_HOME, HF_HOME), or set model.weights to a file"
    )
    missing = [each for each in facts if each.weights is not None]  # the first rank of each node has looked
    for each in missing:
        if each.unreachable is not None:
            report.fail(
                GROUP, "model.weights", f"{each.weights} must be downloaded on {each.host}, which will fail: "
                f"{each.unreachable}; {remedy}",
            )  # fmt: skip
        else:
            report.warn(GROUP, "model.weights", f"{each.weights} will be downloaded on {each.host} when the run starts")
    if missing:
        return
    path, digest = weights_file(config)
    if path is None:
        own = config.is_own and resolve_weights(config) == "default"
        report.ok(GROUP, "model.weights", f"those that {config.name} loads" if own else "none: random weights")
    elif digest is not None and not sha256_file(path).startswith(digest):
        report.fail(GROUP, "model.weights", f"{path} is damaged: its checksum is wrong; delete it, and {remedy}")
    else:
        checked = ", with the published checksum" if digest is not None else ""
        report.ok(GROUP, "model.weights", f"{path}, {size(path.stat().st_size)}{checked}")
