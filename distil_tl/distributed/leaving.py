"""How a rank leaves the others: because of a signal, to start again, or because another rank is gone."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from distil_tl.distributed.sockets import shut_down
from distil_tl.distributed.store import LEAVE_SECONDS
from distil_tl.utils.errors import PreemptedError, RestartError
from distil_tl.utils.threads import CallTimeoutError, call_with_timeout

if TYPE_CHECKING:
    from distil_tl.distributed.process_group import DistInfo

REQUEUE_SECONDS = 120  # for rank 0 to requeue the job and exit; a launcher may kill it when another rank exits first
SAME_ERROR_SECONDS = 15  # for rank 0 to print the error that all ranks have, and exit
SUSPENSION_SECONDS = 3  # for the watchdog to say that the job was suspended
RESTART_SECONDS = 120  # for all ranks to close their records before they start again


def leave(info: DistInfo, error: PreemptedError | RestartError) -> None:
    """End the group on this rank first, and tell the others, which may not know yet why it leaves."""
    if info.store is None:  # it came before all were connected
        return
    restart = isinstance(error, RestartError)
    if restart:
        info.leave(orderly=True, seconds=None)
    store = info.store.with_timeout(LEAVE_SECONDS)
    with suppress(dist.DistError):  # a store in another process may be gone as soon as all ranks are counted
        store.set_departure(error)
        # Ranks that wait for this one in a collective get an error, and read the store. The group itself stays as long
        # as an object refers to it, as DDP does.
        shut_down(info.group_sockets)
        end_group(info.device)
        # This process may serve the store. Processes that start again must not connect to the old one, which rank 0
        # serves until it has closed its records.
        store.count_ranks("leaving", info.world_size, RESTART_SECONDS if restart else LEAVE_SECONDS, leaving=True)
    if restart and info.watchdog is not None:
        info.watchdog.close()
    else:
        exit_after_rank_zero(info, REQUEUE_SECONDS)


def end_group(device: torch.device) -> None:
    """End torch's process group without waiting for the collectives that run.

    With NCCL, to destroy the group would wait for them, and they for the other ranks. To abort it ends them.
    """
    if device.type == "cuda" and "nccl" in str(dist.get_backend_config()):
        group = dist.group.WORLD
        with suppress(CallTimeoutError, RuntimeError):
            call_with_timeout(LEAVE_SECONDS, lambda: group._get_backend(device).abort())  # type: ignore[union-attr]
    with suppress(CallTimeoutError):
        call_with_timeout(LEAVE_SECONDS, dist.destroy_process_group)


def exit_after_rank_zero(info: DistInfo, seconds: float) -> None:
    """Let rank 0 exit first. It prints the message and requeues the job; a launcher would end it with this rank."""
    if not info.is_main and info.watchdog is not None:
        info.watchdog.wait_for_end_of_rank_zero(seconds)


def cause_of(info: DistInfo, error: BaseException) -> BaseException:
    """The PreemptedError or RestartError that explains a lost connection; else `error` itself.

    It is of another rank, or of all, if the job was suspended for so long that torch gave up a collective. After
    training has started the ranks stop together, so a preemption explains nothing then. A store that is gone gets no
    request: torch would print a stack trace.
    """
    url = info.launch.url
    of_store = isinstance(error, (dist.DistStoreError, dist.DistNetworkError))
    lost = isinstance(error, RuntimeError) and is_lost_connection(error) and not of_store
    if not lost or info.store is None or url is None or not _accepts_connections(url):
        return error
    try:
        info.store.raise_departure()
    except RestartError as restart:
        return restart
    except PreemptedError as preempted:
        return error if info.training_started else preempted
    except dist.DistError:
        pass
    return suspension(info) or error


def suspension(info: DistInfo) -> RestartError | None:
    """The error with which the ranks start again after their job was suspended; None if that explains nothing.

    Torch counts that time, too: a collective that waited meanwhile ends with a timeout when the job is continued. If it
    was less than half of the timeout, the rank has waited for long all the same.
    """
    timeout, watchdog = info.batch_timeout, info.watchdog
    seconds = 0.0 if watchdog is None else watchdog.suspended(within=timeout, wait=SUSPENSION_SECONDS)
    if watchdog is None or watchdog.lost() is not None or seconds < timeout / 2:
        return None
    return RestartError(
        f"the job was suspended for {seconds:.0f} s, and distributed.timeout_seconds={timeout:g} passed meanwhile: the "
        f"run starts again from its last checkpoint. With a longer timeout it would continue where it was",
        {},
    )


def _accepts_connections(url: str) -> bool:
    """Whether a process listens at the address of the store."""
    try:
        socket.create_connection(store_address(url), timeout=2).close()
    except OSError:
        return False
    return True


def store_address(url: str) -> tuple[str, int]:
    """Host and port."""
    parts = urlsplit(url)
    host, port = parts.hostname or os.environ.get("MASTER_ADDR"), parts.port or os.environ.get("MASTER_PORT")
    return str(host), int(port or 0)


def is_lost_connection(error: RuntimeError) -> bool:
    # Gloo's own errors are plain RuntimeErrors.
    texts = ("gloo/transport", "caused pair closure")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in texts)
