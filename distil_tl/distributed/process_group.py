"""Who this process is among the ranks: found once, checked, and passed on as values."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.store import Store, connect, within
from distil_tl.utils.errors import LostRanksError, PreemptedError, UserError

NCCL_STARTS_IN = 600  # seconds, at most


@dataclass
class DistInfo:
    """This process among the ranks, set up: `device` is current, and collectives work when `world_size` > 1.

    `phase` says what the ranks are doing, for whoever reads that they lost each other.
    """

    launch: Launch
    device: torch.device
    prepare_timeout: float
    store: Store | None = None  # where there are several ranks
    phase: str = "start-up"
    begun: bool = False  # all ranks have begun to train, and leave together from here on

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.launch.rank == 0


@contextmanager
def session(launch: Launch, config: DistributedConfig) -> Iterator[DistInfo]:
    """Set up the device and, for more than one rank, the process group; tear both down on a clean end.

    On an error the group is left as it is: taking it down needs the other ranks, and they may be stuck waiting
    for this one. Ending the process is what frees them.
    """
    cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", _gpu(launch, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if launch.url is None:
        yield DistInfo(launch, device, config.prepare_timeout_seconds)
        return

    info = DistInfo(launch, device, config.prepare_timeout_seconds)
    _join(info, config)
    try:
        yield info
        dist.barrier()
    except PreemptedError as error:
        _leave(info, error)
        raise
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        # A store that is gone is not asked: torch would print a stack for it.
        asks = not info.begun and not isinstance(error, dist.DistError) and _answers(launch.url)
        left = None
        with suppress(dist.DistError):
            left = _left_because(info.store) if asks and info.store is not None else None
        if left is not None:
            _leave(info, left)
            raise left from error
        raise LostRanksError(
            f"rank {info.rank} lost the other ranks during {info.phase}: {str(error).splitlines()[0]}. A rank ended or "
            f"did not answer within distributed.timeout_seconds={config.timeout_seconds:g}; see the others' logs"
        ) from error
    dist.destroy_process_group()


def _join(info: DistInfo, config: DistributedConfig) -> None:
    """Meet the other ranks: give `info` its store, and torch its process group.

    Raises:
        LostRanksError: they are not there in time, or end before all have met.
    """
    launch, device = info.launch, info.device
    backend = config.backend if config.backend != "auto" else ("nccl" if device.type == "cuda" else "gloo")
    assert launch.url is not None

    def form_group(store: Store) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a current device of its own
        dist.init_process_group(
            # CPU tensors (stop flags, the index, counts) always travel over gloo, so they never wait for a GPU.
            "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
            store=store.inner,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(seconds=config.timeout_seconds),
            device_id=device if backend == "nccl" else None,
        )

    try:
        store = connect(launch, config.timeout_seconds)
        # Longer than torch itself takes to say what it misses; NCCL's start is no collective, and may take long.
        patience = max(2 * config.timeout_seconds, NCCL_STARTS_IN if backend == "nccl" else 0)
        within(patience, lambda: form_group(store), asking="the other ranks, when forming a group with them")
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        raise LostRanksError(
            f"rank {launch.rank} could not meet the others at {':'.join(map(str, _meeting_place(launch.url)))}: "
            f"{str(error).splitlines()[0]}. All {launch.world_size} must start, and find each other there, within "
            f"distributed.timeout_seconds={config.timeout_seconds:g}; see the others' logs"
        ) from error
    info.store = store.below("distil_tl")


def _leave(info: DistInfo, why: PreemptedError) -> None:
    """Take the group down before the others do, who may not know yet that this rank was asked to stop."""
    assert info.store is not None
    store = info.store.waiting(10)
    with suppress(dist.DistError):  # where the store lives elsewhere, it may be gone as soon as all are counted
        store.set("preempted", str(why))
        dist.destroy_process_group()  # who waits for this rank in a collective finds that out now, and looks here
        _count(store, "leaving", info.world_size, 10, leaving=True)  # the store may live here: let them


def _left_because(store: Store) -> PreemptedError | None:
    """What another rank said when a signal made it leave, if one did. Raises DistError when the store is gone."""
    return PreemptedError(store.get("preempted")) if store.check("preempted") else None


def _answers(url: str) -> bool:
    """Whether somebody listens where the ranks have met."""
    try:
        socket.create_connection(_meeting_place(url), timeout=2).close()
    except OSError:
        return False
    return True


def _meeting_place(url: str) -> tuple[str, int]:
    where = urlsplit(url)
    host, port = where.hostname or os.environ.get("MASTER_ADDR"), where.port or os.environ.get("MASTER_PORT")
    return str(host), int(port or 0)


def _gpu(launch: Launch, visible: int) -> int:
    """Which of the visible GPUs is this process's."""
    if launch.launcher == "slurm" and visible == 1:  # srun --gpus-per-task shows each task its own one only
        return 0
    if launch.local_world_size > visible:  # on all ranks alike, so that none waits for another
        raise UserError(
            f"{launch.local_world_size} processes on a node where torch sees {visible} GPUs; start at most that many, "
            f"or use distributed.device=cpu"
        )
    return launch.local_rank


def _is_lost_contact(error: RuntimeError) -> bool:
    # Gloo's own errors have no type of their own.
    texts = ("gloo/transport", "caused pair closure")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in texts)


def on_rank_zero(info: DistInfo, phase: str, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 alone while the others wait, and give its JSON-able result to all of them.

    The wait is on the store, not in a collective, so work that takes longer than the collective timeout is fine.
    Call it in the same order on all ranks, with a `phase` used once.

    Raises:
        UserError: on all ranks, when `work` raised one.
        LostRanksError: on the waiting ranks, when `work` failed otherwise or took too long.
    """
    if info.store is None:
        return work()
    if info.is_main:
        return _announce(info, phase, work, readers=info.world_size - 1)
    return _await(info, phase)


def once_per_node(info: DistInfo, phase: str, work: Callable[[], None]) -> None:
    """Run `work` on rank 0, then on one rank of every other node, then let all go on.

    For work that fills a cache: on a shared file system the other nodes find it done, on local disks they do it.
    """

    def elsewhere() -> None:
        if info.launch.node > 0:
            work()

    on_rank_zero(info, f"{phase} on rank 0", work)
    on_each_node(info, phase, elsewhere)


def on_each_node(info: DistInfo, phase: str, work: Callable[[], Any]) -> Any:
    """Run `work` on one rank of every node, all at once, and give its JSON-able result to the ranks of that node.

    All ranks go on together. Otherwise as `on_rank_zero`: where `work` raises a UserError, they all do.
    """
    if info.store is None:
        return work()
    here = f"{phase} on node {info.launch.node}"
    result: Any = None
    error: UserError | None = None
    try:
        if info.launch.local_rank == 0:
            result = _announce(info, here, work, readers=info.launch.local_world_size - 1)
        else:
            result = _await(info, here)
    except UserError as caught:
        error = caught
    _raise_together(info, phase, error)
    return result


def _raise_together(info: DistInfo, phase: str, error: UserError | None) -> None:
    """Meet all ranks at the store, however long some of them need, and raise on all what any of them brings."""
    assert info.store is not None
    if error is not None:
        info.store.set(f"{phase}: error", str(error))
    _count(info.store, f"{phase}: finished", info.world_size, info.prepare_timeout)
    if info.store.check(f"{phase}: error"):
        message = info.store.get(f"{phase}: error")
        with suppress(dist.DistError):  # as when leaving: the store may be gone as soon as all are counted
            _count(info.store.waiting(10), f"{phase}: read", info.world_size, 10)
        raise UserError(message)


def _count(store: Store, key: str, expected: int, timeout: float, *, leaving: bool = False) -> None:
    """Be counted under `key`, and wait until so many are or time is up. Raises PreemptedError when a rank leaves."""
    deadline = time.monotonic() + timeout
    here = store.add(key, 1)
    while here < expected and time.monotonic() < deadline:
        if not leaving and (left := _left_because(store)) is not None:
            raise left
        time.sleep(0.05)
        here = store.add(key, 0)


def _announce(info: DistInfo, phase: str, work: Callable[[], Any], readers: int) -> Any:
    assert info.store is not None
    try:
        result = work()
    except BaseException as error:
        kinds: dict[type[BaseException], str] = {UserError: "user_error", PreemptedError: "preempted"}
        kind = kinds.get(type(error), "fault")
        store = info.store.waiting(10)
        store.set(phase, json.dumps({kind: str(error) or repr(error)}))
        # The store may live in this process: let the others read the reason before it ends.
        deadline = time.monotonic() + 10
        while store.add(f"{phase}: read", 0) < readers and time.monotonic() < deadline:
            time.sleep(0.05)
        raise
    info.store.set(phase, json.dumps({"result": result}))
    return result


def _await(info: DistInfo, phase: str) -> Any:
    assert info.store is not None
    store, deadline = info.store, time.monotonic() + info.prepare_timeout
    while not store.check(phase):
        if (left := _left_because(store)) is not None:
            raise left
        if time.monotonic() > deadline:
            raise LostRanksError(
                f"rank {info.rank} waited {info.prepare_timeout:g} s for another rank: {phase}; "
                f"raise distributed.prepare_timeout_seconds if the work is that long"
            )
        time.sleep(0.05)
    answer = json.loads(store.get(phase))
    if "result" not in answer:
        store.add(f"{phase}: read", 1)
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "preempted" in answer:
        raise PreemptedError(answer["preempted"])
    if "fault" in answer:
        raise LostRanksError(f"another rank failed: {phase}: {answer['fault']}")
    return answer["result"]


def cpus_of_rank(launch: Launch) -> int:
    """How many CPUs there are for this rank and its loader processes, at least 1.

    Slurm may bind each task to CPUs of its own; otherwise the ranks of a node share what this process may run on.
    """
    cpus, step = available_cpus(), os.environ.get("SLURM_CPUS_ON_NODE", "")
    bound = launch.launcher == "slurm" and step.isdigit() and cpus < int(step)
    return cpus if bound else max(1, cpus // launch.local_world_size)


def available_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
