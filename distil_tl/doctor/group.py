"""gloo and NCCL at work: the ranks form training's process group, and add up numbers."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from distil_tl.distributed.launch_env import Launch
from distil_tl.doctor.lines import FAIL, OK, Report, first_line, name_ranks
from distil_tl.doctor.meeting import LONGEST, Meeting
from distil_tl.utils.threads import CallTimeoutError, call_with_timeout

GROUP = "collectives"
MEASURED_BYTES = 64 << 20
FORMING = "forming the process group"


def backends_of(device: str, backend: str) -> list[str]:
    """The backends that a run uses: gloo for tensors on the CPU, and NCCL on GPUs unless `backend` is gloo."""
    return ["gloo", "nccl"] if device == "cuda" and backend != "gloo" else ["gloo"]


def try_collectives(meeting: Meeting, backends: Sequence[str], gpu: int | None, seconds: float) -> dict[str, Any]:
    """Reduce among all ranks with each backend. A collective, but it ends on every rank by itself.

    Returns:
        By name of the backend, {"rate": bytes per second of an all-reduce}, or {"problem": why there is no sum}. After
        the first problem the other backends are not tried.
    """
    assert meeting.store is not None
    launch, found = meeting.launch, dict[str, Any]()
    started = time.monotonic()
    try:
        call_with_timeout(seconds, lambda: _form(meeting, backends, gpu))
    except Exception as error:
        found[backends[-1]] = {"problem": _problem(FORMING, error, time.monotonic() - started)}
        return found
    for backend in backends:
        device = torch.device("cpu" if backend == "gloo" else f"cuda:{gpu}")
        started = time.monotonic()
        try:
            found[backend] = {"rate": call_with_timeout(seconds, lambda device=device: _reduce(launch, device))}  # type: ignore[misc]
        except Exception as error:
            found[backend] = {"problem": _problem("an all-reduce", error, time.monotonic() - started)}
            return found
    try:
        call_with_timeout(seconds, dist.destroy_process_group)
    except Exception as error:
        found[backends[-1]] = {"problem": _problem("leaving the process group", error, time.monotonic() - started)}
    return found


def _form(meeting: Meeting, backends: Sequence[str], gpu: int | None) -> None:
    assert meeting.store is not None
    nccl = "nccl" in backends
    if nccl and gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        # A copy, which has a connection of its own: while it waits for a rank, this process can use the other.
        store=meeting.store.below("group").inner.clone(),
        rank=meeting.launch.rank,
        world_size=meeting.launch.world_size,
        # What hangs is given up in its thread. NCCL would end the process when this time is over.
        timeout=datetime.timedelta(seconds=LONGEST),
        device_id=torch.device("cuda", gpu) if nccl and gpu is not None else None,
    )


def _reduce(launch: Launch, device: torch.device) -> float:
    """Add up ones, and then many of them with a clock. Returns bytes per second."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    numbers = torch.ones(MEASURED_BYTES // 4, device=device)
    small = numbers[:1].clone()
    dist.all_reduce(small)
    if float(small) != launch.world_size:
        raise RuntimeError(f"the sum of {launch.world_size} ones is {float(small):g}")
    began = time.monotonic()
    dist.all_reduce(numbers)
    right = bool((numbers == launch.world_size).all())  # waits for the device
    seconds = time.monotonic() - began
    if not right:
        raise RuntimeError("a large sum is wrong")
    return MEASURED_BYTES / max(seconds, 1e-9)


def _problem(what: str, error: Exception, seconds: float) -> str:
    if isinstance(error, CallTimeoutError):
        return f"{what} did not end within {seconds:.0f} s"
    return f"{what} failed: {first_line(error)}"


def judge_collectives(report: Report, backends: Sequence[str], results: Mapping[int, Any], world_size: int) -> None:
    """Lines about each backend, from what the ranks found.

    Args:
        results: by rank; ranks that did not answer are missing.
    """
    names = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
    silent = sorted(set(range(world_size)) - set(results))
    if silent:
        report.fail(GROUP, "ranks", f"{name_ranks(silent)} did not answer after the all-reduce; see their output")
    for backend in backends:
        found = {rank: each[backend] for rank, each in results.items() if backend in each}
        problems = {rank: each["problem"] for rank, each in found.items() if "problem" in each}
        variable = names[backend]
        if problems:
            report.per_rank(GROUP, backend, {
                rank: (FAIL, f"{text}; can the nodes reach each other, and does {variable} name the right network "
                       f"interface?") for rank, text in problems.items()
            }, of=world_size)  # fmt: skip
            continue
        rates = [each["rate"] for each in found.values()]
        if rates:
            own = f", {variable}={os.environ[variable]}" if variable in os.environ else ""
            report.add(
                GROUP, backend, OK, f"{world_size} ranks add up right; an all-reduce of 64 MiB runs at "
                f"{min(rates) / 1e9:.2f} GB/s{own}",
            )  # fmt: skip
