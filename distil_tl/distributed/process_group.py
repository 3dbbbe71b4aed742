"""Set-up of this process among the ranks: its device, the store, its watchdog and torch's process group."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.device import choose_device, describe, say_device
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.meeting import meet
from distil_tl.distributed.store import LEAVE_SECONDS, Store, connect, within
from distil_tl.distributed.watchdog.client import RankWatchdog
from distil_tl.utils.errors import LostRanksError, NonFiniteError, PreemptedError, UserError
from distil_tl.utils.threads import CallTimeoutError, call_with_timeout

NCCL_INIT_SECONDS = 600  # NCCL's initialisation may take longer than a collective
END_SECONDS = 180  # for this rank to end by itself, after an error or when it is done
VERDICT_SECONDS = 3  # in which the watchdogs find out which rank is the reason for a lost connection
REQUEUE_SECONDS = 120  # for rank 0 to requeue the job and exit; a launcher may kill it when another rank exits first
SAME_ERROR_SECONDS = 15  # for rank 0 to print the error that all ranks have, and exit


@dataclass
class DistInfo:
    """This process among the ranks: `device` is the current one, and collectives work when `world_size` > 1.

    `phase` names what the ranks do now; the message for a lost rank contains it.
    """

    launch: Launch
    device: torch.device
    prepare_timeout: float  # seconds that the other ranks wait for work of one rank
    store: Store | None = None  # None for a single rank
    watchdog: RankWatchdog | None = None  # None for a single rank
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
    info = DistInfo(launch, device, config.prepare_timeout_seconds)
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
    except PreemptedError as error:
        _leave(info, error)
        raise
    except (UserError, NonFiniteError) as error:
        if isinstance(error, NonFiniteError) or not error.one_rank:
            _exit_after_rank_zero(info, SAME_ERROR_SECONDS)
            if isinstance(error, UserError):
                error.rank_zero_ended = watchdog.process is not None
        raise
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        if (preempted := _preemption_behind(info, error)) is not None:
            _leave(info, preempted)
            raise preempted from error
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
        if connected and isinstance(error, PreemptedError):
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
    address = _store_address(launch.url)

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
        if not _is_lost_connection(error):
            raise
        lost = watchdog.lost(wait=VERDICT_SECONDS) or str(error).splitlines()[0]
        raise LostRanksError(
            f"rank {launch.rank} could not connect to the other ranks at {':'.join(map(str, address))}: {lost}. All "
            f"{launch.world_size} must start, and connect there, within "
            f"distributed.timeout_seconds={config.timeout_seconds:g}; see the logs of the others"
        ) from error
    info.store = store.below("distil_tl")
    say_device(launch, device, backend, nodes)


def _leave(info: DistInfo, error: PreemptedError) -> None:
    """End the group on this rank first, and tell the others, which may not know yet that a signal stopped it."""
    if info.store is None:  # it came before all were connected
        return
    store = info.store.with_timeout(LEAVE_SECONDS)
    with suppress(dist.DistError):  # a store in another process may be gone as soon as all ranks are counted
        store.set_preempted(error)
        _end_group(info.device)  # ranks that wait for this one in a collective get an error, and read the store
        store.count_ranks("leaving", info.world_size, LEAVE_SECONDS, leaving=True)  # this process may serve the store
    _exit_after_rank_zero(info, REQUEUE_SECONDS)


def _end_group(device: torch.device) -> None:
    """End torch's process group without waiting for the collectives that run.

    With NCCL, to destroy the group would wait for them, and they for the other ranks. To abort it ends them.
    """
    if device.type == "cuda" and "nccl" in str(dist.get_backend_config()):
        group = dist.group.WORLD
        with suppress(CallTimeoutError, RuntimeError):
            call_with_timeout(LEAVE_SECONDS, lambda: group._get_backend(device).abort())  # type: ignore[union-attr]
    with suppress(CallTimeoutError):
        call_with_timeout(LEAVE_SECONDS, dist.destroy_process_group)


def _exit_after_rank_zero(info: DistInfo, seconds: float) -> None:
    """Let rank 0 exit first. It prints the message and requeues the job; a launcher would end it with this rank."""
    if not info.is_main and info.watchdog is not None:
        info.watchdog.wait_for_end_of_rank_zero(seconds)


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


def _is_lost_connection(error: RuntimeError) -> bool:
    # Gloo's own errors are plain RuntimeErrors.
    texts = ("gloo/transport", "caused pair closure")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in texts)
