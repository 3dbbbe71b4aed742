"""Checking that a rewritten network computes the same function as the original one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

TOLERANCE = 1e-4  # relative to the largest logit: what folding and reordering may change in float32


class NotEquivalentError(Exception):
    """The rewritten network computes another function than the original one; the message is the reason."""


@contextlib.contextmanager
def preserve_state(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore train/eval modes, statistics of norms and random generators at the end of the block."""
    modes = [(part, part.training) for part in module.modules()]
    norms = [part for part in module.modules() if isinstance(part, _NormBase)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
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
    """Disable TF32 in cuDNN's convolutions: its rounding is coarser than `TOLERANCE`."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def without_report(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """`network`, without the traceback that torch.fx prints to standard error where its graph raises an error."""
    return network.forward if isinstance(network, fx.GraphModule) else network


@torch.no_grad()
@in_full_float32()
def check_equivalent(
    rewritten: Callable[[Tensor], Tensor],
    module: nn.Module,
    images: Tensor,
    *,
    called: str,
    modes: Sequence[bool] = (True, False),
) -> None:
    """Compare the logits of `rewritten`, which shares the modules of `module`, with those of `module`.

    Args:
        called: a name for `rewritten` in the message, in the plural.
        modes: the modes to compare in: True for training, False for evaluation.

    Raises:
        NotEquivalentError: they differ by more than rounding.
    """
    with preserve_state(module, images.device):
        for mode in modes:
            module.train(mode)
            torch.manual_seed(0)
            expected = module(images)
            torch.manual_seed(0)
            actual = rewritten(images)
            if not isinstance(expected, Tensor) or not isinstance(actual, Tensor) or actual.shape != expected.shape:
                raise NotEquivalentError("its output is not one tensor of logits")
            close = (actual - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1e-3)
            if not close:  # also where one of them is NaN
                raise NotEquivalentError(f"{called} give other results than the whole network")
