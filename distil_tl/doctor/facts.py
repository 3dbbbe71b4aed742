"""What one rank finds out about its process, its node and its folders, as JSON for rank 0, which judges all of it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import platform
import resource
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from distil_tl.data.config import DataConfig
from distil_tl.data.loader_processes import start_problem
from distil_tl.data.pixels import pixel_digests
from distil_tl.data.prefetch import free_shared_memory
from distil_tl.distributed.config import DistributedConfig
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
        device: cuda or cpu: what training would use; cpu where it refuses the device.
        cpus: for this rank and its loader processes.
        allowed_cpus: that this process may run on.
        machine_cpus: of the machine.
        shm: free bytes in /dev/shm; None if there is none.
        memory_files: whether loader processes can return batches in anonymous memory, and do not need /dev/shm.
        locks: why no lock for loader processes can be created in /dev/shm; None if one can.
        open_files: how many files this process may open.
        memory: free bytes of the node, limited by the control group.
        folders: by name.
        pixels: digests of decoded reference images, by format.
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
    locks: str | None = None
    open_files: int = 1024
    memory: int = 0
    folders: dict[str, FolderFacts] = field(default_factory=dict)
    pixels: dict[str, str] = field(default_factory=dict)
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
    launch: Launch,
    distributed: DistributedConfig,
    folders: Mapping[str, tuple[str, bool]],
    data: DataConfig | None,
    model: ModelConfig | None,
    seconds: float,
) -> Facts:
    """The facts of this rank.

    Args:
        distributed: that section of the configuration.
        folders: path, and whether it is written to, by name.
        data: whose formats are decoded; None: none.
        model: whose weights are looked for; None: none.
        seconds: limit for all of it.
    """
    facts = Facts(
        rank=launch.rank, host=socket.gethostname(), node=launch.node, local_world_size=launch.local_world_size
    )
    found, problems = dict[str, Any](), dict[str, str]()

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            found[name] = call_with_timeout(seconds, work)
        except CallTimeoutError:
            problems[name] = f"did not answer within {seconds:g} s"
        except Exception as error:
            problems[name] = f"could not be checked: {type(error).__name__}: {first_line(error)}"

    checks: dict[str, Callable[[], Any]] = {
        "versions": versions, "GPUs": lambda: find_gpus(launch, distributed), "machine": lambda: machine_facts(launch),
    }  # fmt: skip
    checks |= {name: functools.partial(probe_folder, *folder) for name, folder in folders.items()}
    if data is not None:
        checks["decoders"] = lambda: pixel_digests(data)
    if model is not None and launch.local_rank == 0:
        checks["weights"] = lambda: find_weights(model)
    # Side by side: a check that hangs does not delay the others, and together they take at most `seconds`.
    threads = [threading.Thread(target=attempt, args=check, daemon=True) for check in checks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    facts.versions = found.get("versions", {})
    facts.device, facts.gpu = found.get("GPUs", (facts.device, facts.gpu))
    for name, value in found.get("machine", {}).items():
        setattr(facts, name, value)
    facts.folders = {name: found[name] for name in folders if name in found}
    facts.pixels = found.get("decoders", {})
    facts.weights, facts.unreachable = found.get("weights", (None, None))
    facts.failed = {name: problems[name] for name in checks if name in problems}
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


def machine_facts(launch: Launch) -> dict[str, Any]:
    """CPUs, memory and limits of this rank, as the fields of `Facts`."""
    return {
        "cpus": cpus_of_rank(launch), "allowed_cpus": available_cpus(), "machine_cpus": os.cpu_count() or 1,
        "shm": free_shared_memory(), "memory_files": has_memory_files(), "locks": lock_problem(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "memory": available_memory(),
    }  # fmt: skip


def lock_problem() -> str | None:
    """Why loader processes can't be started, which need locks in /dev/shm; None if nothing speaks against it."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        cause, remedy = start_problem(error)
        return f"{cause}: images will be loaded in the training process, which takes much longer; {remedy}"
    return None


def find_weights(model: ModelConfig) -> tuple[str | None, str | None]:
    """The weights that this node must download, and why they can't be downloaded."""
    from distil_tl.doctor.weights import download_problem, missing_weights  # timm takes seconds to import

    missing = missing_weights(model)
    return missing, None if missing is None else download_problem(model)
