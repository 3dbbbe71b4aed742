"""Parameter groups and the optimizer of a stage, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distil_tl.models.transfer import TransferModel
from distil_tl.training.stage import StageConfig

# Parameters of torchvision's models that have more than one dimension and yet are no weights of a layer.
_NOT_DECAYED = ("pos_embedding", "class_token", "layer_scale", "relative_position_bias_table")

OPTIMIZERS = ("adamw", "sgd")
COMPRESSIONS = ("none", "bf16")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | sgd
    weight_decay: float = 0.01  # of weights; norms, biases, class tokens and position embeddings have none
    momentum: float = 0.9  # sgd's (Nesterov)
    warmup: float = 0.1  # share of a stage's steps over which the learning rate rises
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    label_smoothing: float = 0.0  # share of each target that is spread over all classes
    clip_norm: float | None = 1.0  # largest global norm of the gradient; null: no clipping
    compression: str = "none"  # of gradients between ranks: none | bf16, half the bytes for slow networks

    def problems(self) -> list[str]:
        found = []
        if self.name not in OPTIMIZERS:
            found.append(f"optim.name is {self.name!r}; choose one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            found.append(f"optim.schedule is {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.compression not in COMPRESSIONS:
            found.append(f"optim.compression is {self.compression!r}; choose one of {', '.join(COMPRESSIONS)}")
        if self.weight_decay < 0:
            found.append("optim.weight_decay must be 0 or more")
        if not 0 <= self.momentum < 1:
            found.append("optim.momentum must be at least 0 and below 1")
        if not 0 <= self.warmup < 1:
            found.append("optim.warmup is a share of each stage's steps: at least 0 and below 1")
        if not 0 <= self.label_smoothing < 1:
            found.append("optim.label_smoothing must be at least 0 and below 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            found.append("optim.clip_norm must be positive, or null for no clipping")
        return found


def parameter_groups(model: TransferModel, stage: StageConfig, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters by layer group and by whether they decay, head first.

    A group `d` steps below the head has `stage.lr * stage.layer_decay ** d` as `peak_lr` (layer-wise decay: Clark
    et al., ELECTRA, 2020). Vectors and scalars (norms, biases), class tokens and position embeddings do not decay.
    """
    spared: set[str] = getattr(model.module, "no_weight_decay", set)()
    top = len(model.groups) - 1
    members: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            group = model.group_of(name)
            assert group is not None
            is_token = name in spared or name.endswith(_NOT_DECAYED)
            members.setdefault((group, parameter.ndim > 1 and not is_token), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members[group, decays]],
            "param_names": [name for name, _ in members[group, decays]],
            "group": model.groups[group].name,
            "weight_decay": weight_decay if decays else 0.0,
            "peak_lr": stage.lr * stage.layer_decay ** (top - group),
        }
        for group, decays in sorted(members, reverse=True)
    ]


def build_optimizer(model: TransferModel, stage: StageConfig, config: OptimConfig) -> torch.optim.Optimizer:
    """A new optimizer over what the applied `stage` left trainable.

    Fused, on CPU too: the fused kernels take a `found_inf` tensor, with which a step whose gradient is not finite
    changes nothing, without the host having to look at the gradient first.
    """
    groups = parameter_groups(model, stage, config.weight_decay)
    if config.name == "sgd":
        return _sgd(groups, stage.lr, config.momentum)
    return torch.optim.AdamW(groups, lr=stage.lr, fused=True)


def _sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    if momentum:
        # The fused kernel would make these itself, uninitialised, and keep them so when fp16 skips the first step.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factor(step: int, total_steps: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate at `step` (from 0) of a stage of `total_steps`: above 0, at most 1.

    Linear over the first `warmup * total_steps`, then by `schedule` towards 0 at the step after the last.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1 - done
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The highest learning rate among the groups: the head's, where it trains."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor:
    """Clip the global gradient norm; the norm before clipping comes back as a tensor, still on its device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
