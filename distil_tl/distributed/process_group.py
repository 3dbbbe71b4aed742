"""Set-up of this process among the ranks: its device, the store, its watchdog and torch's process group."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.device import choose_device, describe, say_device
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.leaving import (
    SAME_ERROR_SECONDS,
    cause_of,
    exit_after_rank_zero,
    is_lost_connection,
    leave,
    store_address,
)
from distil_tl.distributed.meeting import meet
from distil_tl.distributed.sockets import allow_connections, new_connections, open_sockets
from distil_tl.distributed.store import Store, connect, within
from distil_tl.distributed.watchdog.client import RankWatchdog
from distil_tl.utils.errors import LostRanksError, NonFiniteError, PreemptedError, RestartError, UserError

NCCL_INIT_SECONDS = 600  # NCCL's initialisation may take longer than a collective
END_SECONDS = 180  # for this rank to end by itself, after an error or when it is done
VERDICT_SECONDS = 3  # in which the watchdogs find out which rank is the reason for a lost connection


@dataclass
class DistInfo:
    """This process among the ranks: `device` is the current one, and collectives work when `world_size` > 1.

    `phase` names what the ranks do now; the message for a lost rank contains it.
    """

    launch: Launch
    device: torch.device
    prepare_timeout: float  # seconds that the other ranks wait for work of one rank
    batch_timeout: float = 600.0  # seconds to wait for the images of a batch: as long as for a collective
    store: Store | None = None  # None for a single rank
    watchdog: RankWatchdog | None = None  # None for a single rank
    group_sockets: dict[int, str] = field(default_factory=dict, repr=False)  # the connections of torch's process group
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

    def leave(self, *, orderly: bool, seconds: float | None) -> None:
        """Tell the watchdogs that this rank is about to end by itself, within `seconds`; None: without a limit.

        Args:
            orderly: the other ranks need not end because of it.
        """
        if self.watchdog is not None:
            self.watchdog.leave(orderly=orderly, seconds=seconds)

    def log_to(self, path: Path) -> None:
        """Tell the watchdog the log file of this rank."""
        if self.watchdog is not None:
            self.watchdog.log_to(path)

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
        UserError: the devices that the configuration names are not there, or those of the ranks do not fit together.
        LostRanksError: another rank does not connect, exits or hangs.
        PreemptedError: a signal stopped another rank before training began.
    """
    device, problem = choose_device(launch, config)
    info = DistInfo(launch, device, config.prepare_timeout_seconds, config.timeout_seconds)
    if launch.url is None:
        if problem:
            raise UserError(problem)
        say_device(launch, device, "none", 1)
        yield info
        return
    info.watchdog = watchdog = RankWatchdog()
    try:
        _join(info, config, problem)
        with _told_to_watchdog(watchdog, connected=True):
            yield info
            dist.barrier()
    except (PreemptedError, RestartError) as error:
        leave(info, error)
        raise
    except (UserError, NonFiniteError) as error:
        if isinstance(error, NonFiniteError) or not error.one_rank:
            exit_after_rank_zero(info, SAME_ERROR_SECONDS)
            if isinstance(error, UserError):
                error.rank_zero_ended = watchdog.process is not None
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        cause = cause_of(info, error)
        if isinstance(cause, (PreemptedError, RestartError)):
            leave(info, cause)
            raise cause from error
        lost = watchdog.lost(wait=VERDICT_SECONDS) or (
            f"{str(error).splitlines()[0]}. A rank exited, or did not answer within "
            f"distributed.timeout_seconds={config.timeout_seconds:g}"
        )
        raise LostRanksError(
            f"rank {info.rank} lost contact with the other ranks during {info.phase}: {lost}; see the logs of the "
            f"others"
        ) from error
    watchdog.leave(orderly=True, seconds=END_SECONDS)
    dist.destroy_process_group()
    watchdog.close()


@contextmanager
def _told_to_watchdog(watchdog: RankWatchdog, *, connected: bool) -> Iterator[None]:
    """Tell the watchdog of an exception first of all: from then on it lets this rank end by itself.

    Args:
        connected: the other ranks can learn from the store that a signal stopped this one.
    """
    try:
        yield
    except BaseException as error:
        if connected and isinstance(error, (PreemptedError, RestartError)):
            watchdog.leave(orderly=True, seconds=None)  # rank 0 may have to requeue the job
        else:
            watchdog.leave(orderly=False, seconds=END_SECONDS)
        raise


def _join(info: DistInfo, config: DistributedConfig, problem: str) -> None:
    """Connect to the other ranks: set `info.store`, start the watchdog, and form torch's process group.

    Args:
        problem: with the device of this rank; empty if there is none.

    Raises:
        UserError: on all ranks, if the device of one has a problem, or their devices do not fit together.
        LostRanksError: another rank does not connect in time, or exits before all are connected.
    """
    launch, device, watchdog = info.launch, info.device, info.watchdog
    backend = config.backend if config.backend != "auto" else ("nccl" if device.type == "cuda" else "gloo")
    assert launch.url is not None
    assert watchdog is not None
    address = store_address(launch.url)
    allow_connections(launch.world_size)

    def form_group(store: Store) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is one of each thread
        before = open_sockets()
        dist.init_process_group(
            # CPU tensors (stop flags, the index, counts) always use gloo, so that they never wait for a GPU.
            "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
            store=store.inner,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(seconds=config.timeout_seconds),
            device_id=device if backend == "nccl" else None,
        )
        info.group_sockets = new_connections(before, except_port=address[1])

    try:
        with _told_to_watchdog(watchdog, connected=False):
            store = connect(launch, config.timeout_seconds)
            mine = describe(launch, device, problem)
            nodes = meet(store.below("devices"), mine, launch, config, watchdog, address[0])
            store.watchdog = watchdog
            # Longer than torch's own timeout, whose error says which ranks are missing.
            timeout = max(2 * config.timeout_seconds, NCCL_INIT_SECONDS if backend == "nccl" else 0)
            peer = "the other ranks, while forming the process group"
            within(timeout, lambda: form_group(store), peer=peer, watchdog=watchdog)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        lost = watchdog.lost(wait=VERDICT_SECONDS) or str(error).splitlines()[0]
        raise LostRanksError(
            f"rank {launch.rank} could not connect to the other ranks at {':'.join(map(str, address))}: {lost}. All "
            f"{launch.world_size} must start, and connect there, within "
            f"distributed.timeout_seconds={config.timeout_seconds:g}; see the logs of the others"
        ) from error
    info.store = store.below("distil_tl")
    say_device(launch, device, backend, nodes)
