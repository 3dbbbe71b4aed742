"""Keyed random seeds: a seed depends only on its purpose, never on earlier draws."""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else.

    It is the same on every machine, Python version and process; `hash()` is not. Typical keys are
    `(seed, "order", stage, epoch)` and `(seed, "augment", stage, epoch, position)`.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_torch(device: torch.device, *key: int | str) -> None:
    """Seed torch's generators of the CPU and of `device` with `keyed_seed(*key)`, for dropout and stochastic depth.

    The same as `torch.manual_seed`, without its cost: that also stores a seed and a stack trace for each kind of
    accelerator that is not present, which is too slow for every step.
    """
    seed = keyed_seed(*key)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
