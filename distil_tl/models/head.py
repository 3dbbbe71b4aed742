"""The classifier layer at the end of a network: finding, replacing and initialising it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distil_tl.utils.rng import keyed_seed

# As in DINOv2's linear probes (Oquab et al., 2023): small enough for nearly uniform first predictions.
HEAD_STD = 0.01


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed the CPU generator by `key` for the block, and restore its state afterwards.

    Generators of accelerators are neither seeded nor initialised: modules are built on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(*key))
        yield


def find_head(module: nn.Module) -> str:
    """The path of the last Linear or Conv2d in registration order: the classifier in all torchvision models."""
    paths: list[str] = [path for path, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    return paths[-1]


def replace_head(module: nn.Module, path: str, num_classes: int, inputs: int | None = None) -> None:
    """Replace the layer at `path` by one of the same kind with `num_classes` outputs, with a bias if it had one.

    Args:
        inputs: how many it gets; None for as many as before.

    Raises:
        TypeError: it is neither a Linear nor a Conv2d with a 1x1 kernel.
    """
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(inputs or old.in_features, num_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1):
        new = nn.Conv2d(inputs or old.in_channels, num_classes, kernel_size=1, bias=old.bias is not None)
    else:
        raise TypeError(f"{path} is a {type(old).__name__}, not a classifier layer")
    module.set_submodule(path, new)


def init_head(module: nn.Module, paths: tuple[str, ...], seed: int) -> None:
    """Initialise the layers at `paths` with weights from N(0, 0.01) and zero biases.

    The values depend on `seed` and the path only.

    Raises:
        TypeError: a layer is neither a Linear nor a Conv2d.
    """
    for path in paths:
        init_layer(module.get_submodule(path), path, seed)


def init_layer(layer: nn.Module, path: str, seed: int) -> None:
    """Initialise a classifier layer as `init_head` does, wherever it is."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise TypeError(f"{path} is a {type(layer).__name__}, not a classifier layer")
    with seeded(seed, "model", "head", path):
        nn.init.normal_(layer.weight, std=HEAD_STD)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
