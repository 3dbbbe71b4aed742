"""Running a network to see what it does, without a trace of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

TOLERANCE = 1e-4  # of the largest logit: what folding and reordering may change in float32


@contextlib.contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the network, in whatever mode, without moving its statistics or the random numbers."""
    modes = [(m, m.training) for m in module.modules()]
    moving = [m for m in module.modules() if isinstance(m, _NormBase)]
    buffers = [(buffer, buffer.clone()) for m in moving for buffer in m.buffers(recurse=False)]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)


@contextlib.contextmanager
def in_full_float32() -> Iterator[None]:
    """CUDA computes convolutions in TF32 otherwise, whose rounding is coarser than what is to be compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
@in_full_float32()
def fault_of(
    other: Callable[[Tensor], Tensor],
    module: nn.Module,
    images: Tensor,
    *,
    called: str,
    modes: Sequence[bool] = (True, False),
) -> str | None:
    """Why `other`, made of the modules of `module`, does not stand for it; None where it does.

    Args:
        called: what `other` is, in the plural.
        modes: of training (True) and evaluation, in which both are run.
    """
    with undisturbed(module, images.device):
        for mode in modes:
            module.train(mode)
            torch.manual_seed(0)
            wanted = module(images)
            torch.manual_seed(0)
            found = other(images)
            if not isinstance(wanted, Tensor) or not isinstance(found, Tensor) or found.shape != wanted.shape:
                return "its output is not one tensor of logits"
            close = (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max().clamp(min=1e-3)
            if not close:  # nor where either is not a number
                return f"{called} don't give what the whole does"
    return None
