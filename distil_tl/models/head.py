"""The classifier at the end of a network: found, replaced and initialised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distil_tl.utils.rng import keyed_seed

# As in DINOv2's linear probes (Oquab et al., 2023): small enough that the first predictions are near uniform.
HEAD_STD = 0.01


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Runs a block with the CPU generator seeded by `key`; afterwards the generator is as it was before.

    Accelerator generators are left alone, and none is initialised: modules are built on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(*key))
        yield


def find_head(module: nn.Module) -> str:
    """The path of the last Linear or Conv2d in registration order: torchvision's classifiers, all of them."""
    paths: list[str] = [p for p, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    return paths[-1]


def replace_head(module: nn.Module, path: str, num_classes: int) -> None:
    """Puts a layer of the same kind with `num_classes` outputs at `path`, with a bias if the old one had."""
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1):
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1, bias=old.bias is not None)
    else:
        raise TypeError(f"{path} is a {type(old).__name__}, not a classifier layer")
    module.set_submodule(path, new)


def init_head(module: nn.Module, paths: tuple[str, ...], seed: int) -> None:
    """Weights from N(0, 0.01) and zero biases, a function of `seed` and the path alone."""
    for path in paths:
        layer = module.get_submodule(path)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise TypeError(f"{path} is a {type(layer).__name__}, not a classifier layer")
        with seeded(seed, "model", "head", path):
            nn.init.normal_(layer.weight, std=HEAD_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
