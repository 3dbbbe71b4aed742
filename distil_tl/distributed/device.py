"""The device of a rank, and whether the devices of all ranks fit together."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distil_tl.distributed.config import DistributedConfig, has_gpu_files
from distil_tl.distributed.launch_env import Launch

logger = logging.getLogger(__name__)

# Variables of Slurm that say how many GPUs a job has, or which.
_SLURM_GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS")


@dataclass(frozen=True)
class RankDevice:
    """The device of one rank, as the others need to know it. All fields are JSON.

    Attributes:
        kind: cpu or cuda.
        gpu: identity of the GPU; empty for a CPU, and where it is not known.
        problem: why the rank can't use the device that it should use; empty if it can.
    """

    rank: int
    host: str
    pid: int
    kind: str
    gpu: str = ""
    problem: str = ""


def choose_device(
    launch: Launch, config: DistributedConfig, environ: Mapping[str, str] = os.environ
) -> tuple[torch.device, str]:
    """The device of this rank, and what is wrong with it; an empty text if nothing is."""
    cpu = torch.device("cpu")
    if config.device == "cpu":
        return cpu, "distributed.backend=nccl needs CUDA devices" if config.backend == "nccl" else ""
    if torch.cuda.is_available():
        index, problem = choose_gpu(launch, torch.cuda.device_count(), config.backend)
        if problem:
            return cpu, problem
        device = torch.device("cuda", index)
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:  # in exclusive mode and in use, or broken
            return cpu, f"GPU {index} can't be used: {str(error).partition(chr(10))[0]}"
        return device, ""
    go_on = "repair that, or set distributed.device=cpu to use the CPU"
    if config.device == "cuda" or config.backend == "nccl":
        key = "device=cuda" if config.device == "cuda" else "backend=nccl"
        return cpu, f"distributed.{key}, but torch sees no CUDA device: {_why_no_cuda()}; {go_on}"
    if given := gpus_given(environ):
        return cpu, f"this job was given GPUs ({given}), but torch sees none: {_why_no_cuda()}; {go_on}"
    if has_gpu_files():
        logger.warning("this machine has a GPU, but the CPU is used: %s", _why_no_cuda())
    return cpu, ""


def gpus_given(environ: Mapping[str, str]) -> str:
    """The environment variable by which GPUs were given to this process, such as `CUDA_VISIBLE_DEVICES=0,1`."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if visible and not visible.startswith("-") and visible != "NoDevFiles":
        return f"CUDA_VISIBLE_DEVICES={visible}"
    if "CUDA_VISIBLE_DEVICES" in environ:  # hidden on purpose
        return ""
    found = [name for name in _SLURM_GPUS if environ.get(name, "").strip() not in ("", "0")]
    return f"{found[0]}={environ[found[0]]}" if found else ""


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for CPUs"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "there is no device"


def choose_gpu(launch: Launch, visible: int, backend: str) -> tuple[int, str]:
    """The index of this rank's GPU among the visible ones, and a problem."""
    if launch.launcher == "slurm" and visible == 1:  # with srun --gpus-per-task each task sees only its own
        return 0, ""
    if launch.local_world_size > visible and backend != "gloo":  # over gloo, ranks may share a GPU
        return 0, (
            f"{launch.local_world_size} processes on a node where torch sees {visible} GPUs; start at most that many, "
            f"or use distributed.device=cpu"
        )
    return launch.local_rank % visible, ""


def describe(launch: Launch, device: torch.device, problem: str) -> RankDevice:
    """What the other ranks need to know of this one."""
    gpu = ""
    if device.type == "cuda":
        gpu = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if "MIG-" in visible:  # parts of one GPU
            gpu = f"{gpu} {visible.split(',')[device.index or 0]}"
    return RankDevice(launch.rank, socket.gethostname(), os.getpid(), device.type, gpu, problem)


def problem_of(devices: Sequence[RankDevice], backend: str) -> str:
    """Why these ranks can't train together; empty if they can. Equal on all ranks."""
    for found in devices:
        if found.problem:
            same = [other.rank for other in devices if other.problem == found.problem]
            return f"{some_ranks(same)} on {_hosts(devices, same)}: {found.problem}"
    kinds = {kind: [found.rank for found in devices if found.kind == kind] for kind in ("cuda", "cpu")}
    if all(kinds.values()):
        return (
            f"torch sees CUDA devices on {_hosts(devices, kinds['cuda'])} ({some_ranks(kinds['cuda'])}) but none on "
            f"{_hosts(devices, kinds['cpu'])} ({some_ranks(kinds['cpu'])}): all ranks need the same kind of device. "
            f"Check the driver there (nvidia-smi) and the torch installed there, or set distributed.device=cpu for all"
        )
    if backend == "gloo":
        return ""
    first: dict[str, RankDevice] = {}
    for found in devices:
        other = first.setdefault(found.gpu, found) if found.gpu else found
        if other is not found:
            return (
                f"rank {other.rank} (host {other.host}) and rank {found.rank} (host {found.host}) see the same GPU, "
                f"{found.gpu}, as their own: give each task its own GPU, as `srun --gpus-per-node=N` with N tasks on "
                f"each node does, or start fewer processes"
            )
    return ""


def some_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 3, 5`; at most eight are named."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _hosts(devices: Sequence[RankDevice], ranks: Sequence[int]) -> str:
    hosts = list(dict.fromkeys(devices[rank].host for rank in ranks))
    return ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else "")


def say_device(launch: Launch, device: torch.device, backend: str, nodes: int) -> None:
    """Log the device, the backend and the number of ranks."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    if launch.world_size == 1:
        logger.info("device %s%s", device, name)
    else:
        where = f"{launch.world_size} ranks on {nodes} node{'' if nodes == 1 else 's'}"
        logger.info("device %s%s, backend %s, %s", device, name, backend, where)
