"""Networks for tests: a small one of four layer groups, and real ones with random weights and statistics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distil_tl.models.config import ModelConfig
from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.transfer import TransferModel, build
from distil_tl.models.weight_sources import WeightsInfo
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage

NAMES = ["stem", "layer1", "layer2", "head"]


def block(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(before, after, 3), norm=nn.BatchNorm2d(after), drop=nn.Dropout2d(0.5), relu=nn.ReLU()
        )
    )


def tiny() -> TransferModel:
    """Four groups, each of the first three with a BatchNorm and a dropout; a dropout before the head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            OrderedDict(
                stem=block(3, 4),
                layer1=block(4, 4),
                layer2=block(4, 6),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                drop=nn.Dropout(0.5),
                head=nn.Linear(6, 3),
            )
        )
    groups = tuple(LayerGroup(name, (name,)) for name in NAMES)
    return TransferModel(module, groups, Preprocess(), WeightsInfo("none", None), 10, False)


def images(count: int = 4, size: int = 10) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def random_model(
    name: str, unfreeze: object = "head", size: int = 64, batch_norm: str = "frozen", **drops: Any
) -> TransferModel:
    """A real architecture for 3 classes with random weights and statistics of BatchNorm, frozen as a stage does."""
    model = build(ModelConfig(name, weights="none", **drops), 3, image_size=size, seed=0)
    with torch.no_grad():
        for part in model.module.modules():
            if isinstance(part, nn.BatchNorm2d):  # new statistics are 0 and 1: folding them changes nothing
                part.running_mean.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    apply_stage(model, StageConfig(unfreeze=unfreeze, batch_norm=batch_norm))
    return model


def gradients(network: Callable[[Tensor], Tensor], model: TransferModel, images: Tensor) -> dict[str, Tensor]:
    """Gradients of the model's parameters, by name, for four images that `network` computes."""
    model.module.zero_grad()
    torch.manual_seed(0)  # of dropout
    F.cross_entropy(network(images), torch.tensor([0, 1, 2, 0])).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
