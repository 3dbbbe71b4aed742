"""Randomness by key: a seed is a pure function of what it is for, never of what ran before it."""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else.

    The same on every machine, Python version and process, which `hash()` is not. Typical keys are
    `(seed, "order", stage, epoch)` and `(seed, "augment", stage, epoch, position)`.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_draws(device: torch.device, *key: int | str) -> None:
    """Seed what modules draw from on the CPU and on `device`, dropout's and stochastic depth's, by `keyed_seed(*key)`.

    As `torch.manual_seed` does, which also leaves a seed for each kind of accelerator that isn't there, and a stack
    trace with each: too slow to be done in every step.
    """
    seed = keyed_seed(*key)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
