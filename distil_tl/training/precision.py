"""Precision and memory format: the candidates, and their names in a run's records."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A precision and a memory format.

    Attributes:
        dtype: of autocast; None is plain float32.
        channels_last: memory format of feature maps and of convolution weights.
        benchmark: cuDNN times its algorithms for each size of input, and uses the fastest.
    """

    dtype: torch.dtype | None
    channels_last: bool
    benchmark: bool = False

    def __str__(self) -> str:
        name = next(name for name, dtype in _DTYPES.items() if dtype is self.dtype)
        return name + " channels_last" * self.channels_last + " benchmark" * self.benchmark

    @classmethod
    def parse(cls, text: str) -> Compute:
        """The inverse of `str`, as in `bf16 channels_last`."""
        name, *options = text.split()
        return cls(_DTYPES[name], "channels_last" in options, "benchmark" in options)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)


def candidates(precision: str, module: nn.Module, device: torch.device) -> list[Compute]:
    """The precisions and memory formats that may be tried, the default first. A `precision` that is set leaves one.

    The default of `auto` is bf16 (else fp16) on CUDA, float32 on CPU.
    """
    convolutional = any(isinstance(m, nn.Conv2d) for m in module.modules())
    if precision != "auto":
        return [Compute(_DTYPES[precision], convolutional)]
    if device.type == "cuda":
        half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        found = [Compute(half, True), Compute(half, False), Compute(None, True)]
        if convolutional and not torch.backends.cudnn.deterministic:
            found.append(Compute(half, True, benchmark=True))
    else:
        found = [Compute(None, True), Compute(None, False), Compute(torch.bfloat16, True)]
    if convolutional:
        return found
    return list(dict.fromkeys(Compute(each.dtype, False) for each in found))


def use_benchmark(compute: Compute) -> None:
    """Let cuDNN choose its algorithms as `compute` says, from now on; never by time if a run must repeat bit by bit."""
    torch.backends.cudnn.benchmark = compute.benchmark and not torch.backends.cudnn.deterministic


def set_rounding(*, tf32: bool, deterministic: bool) -> None:
    """Set how operations on CUDA round, for this process. Call it before the first of them."""
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its sums only with this
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, for debugging


def default_compute(precision: str, module: nn.Module, device: torch.device) -> Compute:
    """The candidate that is used without a trial."""
    return candidates(precision, module, device)[0]
