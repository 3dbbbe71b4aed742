"""What one rank finds out about its process, its node and its folders, as JSON for rank 0, which judges all of it."""

from __future__ import annotations

import os
import platform
import resource
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from distil_tl.data.prefetch import free_shared_memory
from distil_tl.distributed.launch_env import Launch, cpus_of_rank
from distil_tl.distributed.shared_memory import has_memory_files
from distil_tl.doctor.folders import FolderFacts, probe_folder
from distil_tl.doctor.gpus import GpuFacts, find_gpus
from distil_tl.doctor.lines import first_line
from distil_tl.models.config import ModelConfig
from distil_tl.utils.memory import available_memory
from distil_tl.utils.threads import CallTimeoutError, available_cpus, call_with_timeout
from distil_tl.utils.version import __version__

PACKAGES = ("torchvision", "omegaconf", "numpy", "pillow", "safetensors")  # without these nothing works
OPTIONAL_PACKAGES = ("timm", "wandb", "submitit", "scikit-learn", "torchcodec", "pi-heif")


@dataclass
class Facts:
    """What one rank found. JSON-able.

    Attributes:
        host: name of the machine.
        versions: of Python, packages, CUDA, cuDNN and NCCL, as far as they exist.
        device: cuda or cpu: what training would use.
        cpus: for this rank and its loader processes.
        allowed_cpus: that this process may run on.
        machine_cpus: of the machine.
        shm: free bytes in /dev/shm; None if there is none.
        memory_files: whether loader processes can return batches in anonymous memory, and do not need /dev/shm.
        open_files: how many files this process may open.
        memory: free bytes of the node, limited by the control group.
        folders: by name.
        weights: name of the weights that this node must download; None if it has them.
        unreachable: why they can't be downloaded; None if they can, or need not.
        failed: what could not be found out, and why.
    """

    rank: int = 0
    host: str = ""
    node: int = 0
    local_world_size: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    gpu: GpuFacts = field(default_factory=GpuFacts)
    cpus: int = 1
    allowed_cpus: int = 1
    machine_cpus: int = 1
    shm: int | None = None
    memory_files: bool = True
    open_files: int = 1024
    memory: int = 0
    folders: dict[str, FolderFacts] = field(default_factory=dict)
    weights: str | None = None
    unreachable: str | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Facts:
        folders = {name: FolderFacts(**folder) for name, folder in content["folders"].items()}
        return cls(**{**content, "gpu": GpuFacts(**content["gpu"]), "folders": folders})


def gather(
    launch: Launch, device: str, folders: Mapping[str, tuple[str, bool]], model: ModelConfig | None, seconds: float
) -> Facts:
    """The facts of this rank.

    Args:
        device: `distributed.device` of the configuration.
        folders: path, and whether it is written to, by name.
        model: whose weights are looked for; None: none.
        seconds: limit for each part.
    """
    facts = Facts(
        rank=launch.rank, host=socket.gethostname(), node=launch.node, local_world_size=launch.local_world_size
    )

    def attempt(name: str, work: Callable[[], None]) -> None:
        try:
            call_with_timeout(seconds, work)
        except CallTimeoutError:
            facts.failed[name] = f"did not answer within {seconds:g} s"
        except Exception as error:
            facts.failed[name] = f"could not be checked: {type(error).__name__}: {first_line(error)}"

    def find_device() -> None:
        facts.gpu = find_gpus(launch)
        facts.device = "cuda" if device != "cpu" and facts.gpu.visible else "cpu"

    def find_weights() -> None:
        from distil_tl.doctor.weights import download_problem, missing_weights  # timm takes seconds to import

        assert model is not None
        facts.weights = missing_weights(model)
        if facts.weights is not None:
            facts.unreachable = download_problem(model)

    attempt("versions", lambda: facts.versions.update(versions()))
    attempt("GPUs", find_device)
    attempt("machine", lambda: _describe_machine(facts, launch))
    for name, (path, write) in folders.items():
        attempt(name, lambda name=name, path=path, write=write: facts.folders.update({name: probe_folder(path, write)}))  # type: ignore[misc]
    if model is not None and launch.local_rank == 0:
        attempt("weights", find_weights)
    return facts


def versions() -> dict[str, str]:
    """Versions by name; what is missing is left out. Packages are not imported."""
    found = {"distil_tl": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        if cudnn is not None:
            found["cuDNN"] = str(cudnn)
    if dist.is_available() and dist.is_nccl_available():
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    return found


def _describe_machine(facts: Facts, launch: Launch) -> None:
    facts.cpus, facts.allowed_cpus, facts.machine_cpus = cpus_of_rank(launch), available_cpus(), os.cpu_count() or 1
    facts.shm, facts.memory_files = free_shared_memory(), has_memory_files()
    facts.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    facts.memory = available_memory()
