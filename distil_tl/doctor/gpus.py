"""What torch and the driver say about the GPUs of this process."""

from __future__ import annotations

import csv
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.device import choose_device
from distil_tl.distributed.launch_env import Launch
from distil_tl.doctor.lines import first_line, size
from distil_tl.utils.processes import run_text

SMI_SECONDS = 20  # nvidia-smi without the persistence daemon takes seconds on a node with many GPUs
# The oldest driver for programs that were built with each major version of CUDA (its documentation, minor version
# compatibility).
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}


@dataclass
class GpuFacts:
    """The GPUs as one rank sees them. JSON-able.

    Attributes:
        files: number of device files /dev/nvidia0, /dev/nvidia1, ...
        driver: version of the driver, such as 580.65.06; None if there is none.
        reason: why torch sees no GPU, in torch's words.
        problem: why training refuses the device of this rank; empty if it does not.
        visible: names of the GPUs that torch sees.
        index: of the GPU that this rank uses; None if it uses none.
        name, uuid, memory, free, capability: of that GPU.
        bf16: whether it computes in bf16 without emulation.
        others: other processes on it, such as `process 4711 with 3.2 GiB`.
        fault: why a small computation on it failed.
    """

    files: int = 0
    driver: str | None = None
    reason: str | None = None
    problem: str = ""
    visible: list[str] = field(default_factory=list)
    index: int | None = None
    name: str = ""
    uuid: str = ""
    memory: int = 0
    free: int = 0
    capability: str = ""
    bf16: bool = False
    others: list[str] = field(default_factory=list)
    fault: str | None = None


def find_gpus(launch: Launch, config: DistributedConfig) -> tuple[str, GpuFacts]:
    """The type of device that training would use in this rank, and what the rank sees.

    On its GPU it allocates a little memory, and computes. With distributed.device=cpu nothing is looked at.
    """
    device, problem = _choose(launch, config)
    if config.device == "cpu":
        return device.type, GpuFacts(problem=problem)
    facts = GpuFacts(files=len(device_files()), driver=driver_version(), problem=problem)
    if not torch.cuda.is_available():
        facts.reason = why_unavailable()
        return device.type, facts
    facts.visible = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if device.type == "cuda":
        facts.index = device.index
        _describe(facts, device.index)
    return device.type, facts


def _choose(launch: Launch, config: DistributedConfig) -> tuple[torch.device, str]:
    """The device as training chooses it, and its problem. Its warning is not logged: the table has it."""
    log = logging.getLogger(choose_device.__module__)
    before, log.disabled = log.disabled, True
    try:
        return choose_device(launch, config)
    finally:
        log.disabled = before


def _describe(facts: GpuFacts, index: int) -> None:
    properties = torch.cuda.get_device_properties(index)
    facts.name, facts.memory = properties.name, properties.total_memory
    facts.capability = f"{properties.major}.{properties.minor}"
    facts.uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    with torch.cuda.device(index):
        facts.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # as training asks
    facts.others = [text for uuid, text in other_processes() if uuid.removeprefix("GPU-") == facts.uuid]
    try:
        facts.free = torch.cuda.mem_get_info(index)[0]
        ones = torch.ones(8, 8, device=torch.device("cuda", index))
        if float((ones @ ones).sum()) != 512:
            facts.fault = "8 x 8 ones multiplied by themselves are not 512"
    except RuntimeError as error:  # also torch.OutOfMemoryError
        facts.fault = first_line(error)


def device_files(folder: Path = Path("/dev")) -> list[Path]:
    """The device files of NVIDIA's driver."""
    return sorted(path for path in folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def why_unavailable() -> str:
    """Why torch sees no CUDA device, in its own words."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # AssertionError, RuntimeError and others, by version
        return first_line(error)
    return "torch sees no device, for example because CUDA_VISIBLE_DEVICES is empty"


def driver_version() -> str | None:
    """The version of NVIDIA's driver, by nvidia-smi or by the kernel; None if there is no driver."""
    found = _smi(["--query-gpu=driver_version"])
    if found and re.match(r"\d+\.", found[0][0]):
        return found[0][0]
    try:
        match = re.search(
            r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        )
    except OSError:
        return None
    return match[1] if match else None


def driver_problem(driver: str, cuda: str) -> str | None:
    """Why a driver is too old for the CUDA version that torch was built with; None if it is not."""
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    version = tuple(int(part) for part in re.findall(r"\d+", driver)[:2])
    if oldest is None or version >= oldest:
        return None
    return (
        f"the driver {driver} is older than {oldest[0]}.{oldest[1]}, which CUDA {cuda} of this torch needs: update the "
        f"driver, or install a torch for an older CUDA"
    )


def other_processes() -> list[tuple[str, str]]:
    """(UUID of the GPU, description) of each process that computes on a GPU, as far as nvidia-smi sees it."""
    found = []
    for row in _smi(["--query-compute-apps=gpu_uuid,pid,used_memory"]):
        if len(row) == 3 and row[1].isdigit() and int(row[1]) != os.getpid():
            memory = f" with {size(int(row[2]) * 2**20)}" if row[2].isdigit() else ""
            found.append((row[0], f"process {row[1]}{memory}"))
    return found


def _smi(query: Sequence[str]) -> list[list[str]]:
    """The rows that nvidia-smi answers; none if it is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = run_text([command, *query, "--format=csv,noheader,nounits"], timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]
