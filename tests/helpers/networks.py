"""A network of four layer groups that is small enough to see through."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from distil_tl.models.layer_groups import LayerGroup
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.transfer import TransferModel, WeightsInfo

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
