"""The section `distributed` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "gloo", "nccl")


@dataclass
class DistributedConfig:
    device: str = "auto"  # auto | cpu | cuda
    backend: str = "auto"  # auto | gloo | nccl
    timeout_seconds: float = 600.0  # of a collective, and of the rendezvous
    prepare_timeout_seconds: float = 14400.0  # while one rank scans, downloads, copies or writes the demo data
    heartbeat_seconds: float | None = 60.0  # time to end if a rank freezes or its node is lost; null: no such check

    def problems(self) -> list[str]:
        """One message for each value that is not valid. Imports torch only when a value depends on CUDA."""
        found = []
        if self.device not in DEVICES:
            found.append(f"distributed.device is {self.device!r}; choose one of {', '.join(DEVICES)}")
        if self.backend not in BACKENDS:
            found.append(f"distributed.backend is {self.backend!r}; choose one of {', '.join(BACKENDS)}")
        if self.device == "cuda" and not cuda_is_available():
            found.append(
                "distributed.device is cuda, but torch sees no CUDA device; `distil-tl doctor` says why, or use "
                "distributed.device=cpu"
            )
        if self.backend == "nccl" and self.device != "cuda" and (self.device == "cpu" or not cuda_is_available()):
            found.append("distributed.backend=nccl needs CUDA devices; use gloo, or distributed.device=cuda")
        for name in ("timeout_seconds", "prepare_timeout_seconds"):
            if getattr(self, name) <= 0:
                found.append(f"distributed.{name} must be positive")
        if self.heartbeat_seconds is not None and self.heartbeat_seconds <= 0:
            found.append("distributed.heartbeat_seconds must be positive, or null for no check of frozen ranks")
        return found


def cuda_is_available() -> bool:
    """Whether torch sees a CUDA device."""
    import torch  # takes seconds; most configurations are checked without it

    return torch.cuda.is_available()


def has_gpu_files() -> bool:
    """Whether this machine has the device file of a GPU, of NVIDIA or AMD, whether or not torch can use it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
