"""Facts of ranks with GPUs, and the lines of a report, for tests of `distil-tl doctor`."""

from __future__ import annotations

from typing import Any

from distil_tl.doctor.facts import Facts
from distil_tl.doctor.gpus import GpuFacts
from distil_tl.doctor.lines import Report

GIB = 1 << 30


def gpu_rank(rank: int, **changes) -> Facts:
    """A rank on a node with two GPUs, one for each rank. `changes` are to its GPU, else to the rank."""
    gpu = GpuFacts(
        files=2, driver="580.65.06", visible=["H100", "H100"], index=rank % 2, name="H100", uuid=f"gpu-{rank}",
        memory=80 * GIB, free=79 * GIB, capability="9.0", bf16=True,
    )  # fmt: skip
    for name in [name for name in changes if hasattr(gpu, name)]:
        setattr(gpu, name, changes.pop(name))
    versions = {"distil_tl": "0.1.0", "torch": "2.14.1", "CUDA": "13.0", **changes.pop("versions", {})}
    facts = Facts(
        rank=rank, host=f"n{rank // 2}", node=rank // 2, local_world_size=2, device="cuda", gpu=gpu, versions=versions,
        cpus=8, allowed_cpus=16, machine_cpus=16, shm=8 * GIB, open_files=4096, memory=64 * GIB,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(facts, name, value)
    return facts


def found(report: Report, status: str) -> list[str]:
    """The lines with a status, as `group/name: text`."""
    return [f"{line.group}/{line.name}: {line.text}" for line in report.lines if line.status == status]


def lines_of(content: dict[str, Any]) -> list[str]:
    """The lines of the JSON, as `status group/name: text`."""
    return [f"{line['status']} {line['group']}/{line['name']}: {line['text']}" for line in content["lines"]]


def problems(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("ok ")]
