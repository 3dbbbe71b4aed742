"""Set-up of this process among the ranks: its device, the store and torch's process group."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.store import Store, connect, within
from distil_tl.utils.errors import LostRanksError, PreemptedError, UserError

NCCL_INIT_SECONDS = 600  # NCCL's initialisation may take longer than a collective
LEAVE_SECONDS = 10  # for the other ranks to notice that one leaves


@dataclass
class DistInfo:
    """This process among the ranks: `device` is the current one, and collectives work when `world_size` > 1.

    `phase` names what the ranks do now; the message for a lost rank contains it.
    """

    launch: Launch
    device: torch.device
    prepare_timeout: float  # seconds that the other ranks wait for work of one rank
    store: Store | None = None  # None for a single rank
    phase: str = "start-up"
    training_started: bool = False  # all ranks have started to train; from then on they stop together
    _calls: int = field(default=0, repr=False)

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.launch.rank == 0

    def next_call(self) -> str:
        """A new key for the store. It is equal on all ranks that have called this equally often."""
        self._calls += 1
        return f"call {self._calls}"


@contextmanager
def init_distributed(launch: Launch, config: DistributedConfig) -> Iterator[DistInfo]:
    """Set up the device and, for more than one rank, the process group. Destroy the group if there is no error.

    After an error the group stays: to destroy it needs the other ranks, which may wait for this one. They notice when
    this process exits.

    Raises:
        UserError: there are not enough GPUs.
        LostRanksError: another rank does not connect, exits or hangs.
        PreemptedError: a signal stopped another rank before training began.
    """
    cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", _gpu(launch, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    info = DistInfo(launch, device, config.prepare_timeout_seconds)
    if launch.url is None:
        yield info
        return
    _join(info, config)
    try:
        yield info
        dist.barrier()
    except PreemptedError as error:
        _leave(info, error)
        raise
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        if (preempted := _preemption_behind(info, error)) is not None:
            _leave(info, preempted)
            raise preempted from error
        raise LostRanksError(
            f"rank {info.rank} lost contact with the other ranks during {info.phase}: {str(error).splitlines()[0]}. A "
            f"rank exited, or did not answer within distributed.timeout_seconds={config.timeout_seconds:g}; see the "
            f"logs of the others"
        ) from error
    dist.destroy_process_group()


def _join(info: DistInfo, config: DistributedConfig) -> None:
    """Connect to the other ranks: set `info.store`, and form torch's process group.

    Raises:
        LostRanksError: another rank does not connect in time, or exits before all are connected.
    """
    launch, device = info.launch, info.device
    backend = config.backend if config.backend != "auto" else ("nccl" if device.type == "cuda" else "gloo")
    assert launch.url is not None

    def form_group(store: Store) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is one of each thread
        dist.init_process_group(
            # CPU tensors (stop flags, the index, counts) always use gloo, so that they never wait for a GPU.
            "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
            store=store.inner,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(seconds=config.timeout_seconds),
            device_id=device if backend == "nccl" else None,
        )

    try:
        store = connect(launch, config.timeout_seconds)
        # Longer than torch's own timeout, whose error says which ranks are missing.
        timeout = max(2 * config.timeout_seconds, NCCL_INIT_SECONDS if backend == "nccl" else 0)
        within(timeout, lambda: form_group(store), peer="the other ranks, while forming the process group")
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        address = ":".join(map(str, _store_address(launch.url)))
        raise LostRanksError(
            f"rank {launch.rank} could not connect to the other ranks at {address}: {str(error).splitlines()[0]}. All "
            f"{launch.world_size} must start, and connect there, within "
            f"distributed.timeout_seconds={config.timeout_seconds:g}; see the logs of the others"
        ) from error
    info.store = store.below("distil_tl")


def _leave(info: DistInfo, error: PreemptedError) -> None:
    """Destroy the group on this rank first, and tell the others, which may not know yet that a signal stopped it."""
    assert info.store is not None
    store = info.store.with_timeout(LEAVE_SECONDS)
    with suppress(dist.DistError):  # a store in another process may be gone as soon as all ranks are counted
        store.set_preempted(error)
        dist.destroy_process_group()  # ranks that wait for this one in a collective get an error, and read the store
        store.count_ranks("leaving", info.world_size, LEAVE_SECONDS, leaving=True)  # this process may serve the store


def _preemption_behind(info: DistInfo, error: RuntimeError) -> PreemptedError | None:
    """The PreemptedError of another rank that explains a lost connection; None if there is none.

    Only before training: later the ranks stop together. A store that is gone gets no request: torch would print a
    stack trace.
    """
    url = info.launch.url
    if info.training_started or isinstance(error, dist.DistError) or url is None or not _accepts_connections(url):
        return None
    assert info.store is not None
    try:
        info.store.raise_if_preempted()
    except PreemptedError as preempted:
        return preempted
    except dist.DistError:
        pass
    return None


def _accepts_connections(url: str) -> bool:
    """Whether a process listens at the address of the store."""
    try:
        socket.create_connection(_store_address(url), timeout=2).close()
    except OSError:
        return False
    return True


def _store_address(url: str) -> tuple[str, int]:
    """Host and port."""
    parts = urlsplit(url)
    host, port = parts.hostname or os.environ.get("MASTER_ADDR"), parts.port or os.environ.get("MASTER_PORT")
    return str(host), int(port or 0)


def _gpu(launch: Launch, visible: int) -> int:
    """The index of this process's GPU among the visible ones."""
    if launch.launcher == "slurm" and visible == 1:  # with srun --gpus-per-task each task sees only its own
        return 0
    if launch.local_world_size > visible:  # the same on all ranks of the node, so that none waits for another
        raise UserError(
            f"{launch.local_world_size} processes on a node where torch sees {visible} GPUs; start at most that many, "
            f"or use distributed.device=cpu"
        )
    return launch.local_rank


def _is_lost_connection(error: RuntimeError) -> bool:
    # Gloo's own errors are plain RuntimeErrors.
    texts = ("gloo/transport", "caused pair closure")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in texts)
