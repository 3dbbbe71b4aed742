"""Parameter groups and the optimizer of a stage, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distil_tl.training.config import OptimConfig, StageConfig

if TYPE_CHECKING:
    from distil_tl.models.transfer import TransferModel

# Parameters of torchvision models with more than one dimension that are not the weights of a layer.
_NOT_DECAYED = ("pos_embedding", "class_token", "layer_scale", "relative_position_bias_table")


def parameter_groups(model: TransferModel, stage: StageConfig, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by layer group and by weight decay, head first.

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
    """A new optimizer of the parameters that `stage`, which is applied, leaves trainable.

    Fused, on CPU too: fused kernels take a `found_inf` tensor and skip the step when it is set, so a gradient that is
    not finite changes nothing and the host does not have to read it.
    """
    groups = parameter_groups(model, stage, config.weight_decay)
    if config.name == "sgd":
        return _sgd(groups, stage.lr, config.momentum)
    return torch.optim.AdamW(groups, lr=stage.lr, fused=True)


def _sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    if momentum:
        # The fused kernel would create these uninitialised, and they would stay so when fp16 skips the first step.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factor(step: int, total_steps: int, warmup: float, schedule: str) -> float:
    """The learning rate at `step` (from 0) of a stage of `total_steps`, as a share of its peak: above 0, at most 1.

    A linear warm-up over `warmup * total_steps`, then `schedule`, which reaches 0 one step after the last.
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
    """Set the learning rate of each group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The highest learning rate of all groups: the one of the head, where it trains."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor:
    """Clip the global gradient norm. Returns the norm before clipping, as a tensor on its device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
