"""Work that one rank does for all: on rank 0, or on one rank of each node.

The others wait at the store, not in a collective, so the work may take longer than the timeout of a collective.

The ranks call these functions in the same order. So the number of a call is its key in the store; `what` is for
messages, and is compared between the ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from distil_tl.distributed.store import LEAVE_SECONDS, POLL_SECONDS, Store, pause
from distil_tl.utils.errors import LostRanksError, PreemptedError, UserError

if TYPE_CHECKING:
    from distil_tl.distributed.process_group import DistInfo


def on_rank_zero(info: DistInfo, what: str, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 while the others wait, and return its JSON-able result on all ranks.

    All ranks call it, with an equal `what`: the work in a few words, such as "scanning the data". `work` must not call
    a function of this module.

    Raises:
        UserError: on all ranks, when `work` raised one.
        PreemptedError: on all ranks, when a signal interrupted `work`.
        LostRanksError: on the waiting ranks, when `work` raised another exception or took too long.
    """
    if info.store is None:
        return work()
    key = info.next_call()
    if info.is_main:
        return _publish(info.store, key, what, work, readers=info.world_size - 1)
    return _receive(info, key, what)


def once_per_node(info: DistInfo, what: str, work: Callable[[], None]) -> None:
    """Run `work` on rank 0, then on one rank of every other node; all ranks wait until it is done everywhere.

    For work that fills a cache: on a shared file system the other nodes find it filled, on local disks they fill it.
    """

    def on_other_nodes() -> None:
        if info.launch.node > 0:
            work()

    on_rank_zero(info, f"{what} on rank 0", work)
    on_each_node(info, what, on_other_nodes)


def on_each_node(info: DistInfo, what: str, work: Callable[[], Any]) -> Any:
    """Run `work` on one rank of every node at once, and return its JSON-able result on the ranks of that node.

    All ranks wait until all nodes are done. When `work` raises a UserError on one node, all ranks raise it.
    Otherwise like `on_rank_zero`.
    """
    if info.store is None:
        return work()
    key = info.next_call()
    node, what_here = f"{key} node {info.launch.node}", f"{what} on node {info.launch.node}"
    result: Any = None
    error: UserError | None = None
    try:
        if info.launch.local_rank == 0:
            result = _publish(info.store, node, what_here, work, readers=info.launch.local_world_size - 1)
        else:
            result = _receive(info, node, what_here)
    except UserError as caught:
        error = caught
    _raise_on_all(info, info.store, key, error)
    return result


def _raise_on_all(info: DistInfo, store: Store, key: str, error: UserError | None) -> None:
    """Wait for all ranks, and raise on all of them the UserError that any of them has."""
    if error is not None:
        store.set(f"{key}: error", str(error))
    store.count_ranks(f"{key}: finished", info.world_size, info.prepare_timeout)
    if store.check(f"{key}: error"):
        message = store.get(f"{key}: error")
        with suppress(dist.DistError):  # the store may be gone as soon as all ranks are counted
            store.with_timeout(LEAVE_SECONDS).count_ranks(f"{key}: read", info.world_size, LEAVE_SECONDS)
        raise UserError(message)


def _publish(store: Store, key: str, what: str, work: Callable[[], Any], readers: int) -> Any:
    """Run `work`, and write its result or its exception under `key`."""
    try:
        result = work()
    except BaseException as error:
        kinds: dict[type[BaseException], str] = {UserError: "user_error", PreemptedError: "preempted"}
        kind = kinds.get(type(error), "fault")
        store = store.with_timeout(LEAVE_SECONDS)
        store.set(key, json.dumps({"what": what, kind: str(error) or repr(error)}))
        # This process may serve the store: the others must read the message before it exits.
        deadline = time.monotonic() + LEAVE_SECONDS
        while store.add(f"{key}: read", 0) < readers and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        raise
    store.set(key, json.dumps({"what": what, "result": result}))
    return result


def _receive(info: DistInfo, key: str, what: str) -> Any:
    """Wait for what another rank writes under `key`: return the result, or raise the exception."""
    assert info.store is not None
    store, deadline = info.store, time.monotonic() + info.prepare_timeout
    while not store.check(key):
        store.raise_if_ended()
        if time.monotonic() > deadline:
            raise LostRanksError(
                f"rank {info.rank} waited {info.prepare_timeout:g} s for another rank: {what}; "
                f"raise distributed.prepare_timeout_seconds if this work takes longer"
            )
        time.sleep(pause(info.world_size))
    answer = json.loads(store.get(key))
    if "result" not in answer:
        store.add(f"{key}: read", 1)
    if answer["what"] != what:
        raise RuntimeError(f"the ranks do different work: another rank {answer['what']!r}, rank {info.rank} {what!r}")
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "preempted" in answer:
        raise PreemptedError(answer["preempted"])
    if "fault" in answer:
        raise LostRanksError(f"another rank failed: {what}: {answer['fault']}")
    return answer["result"]
