"""The ranks meet at the store before they form a group: they compare their devices, and start their watchdogs."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.device import RankDevice, problem_of, some_ranks
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.store import LEAVE_SECONDS, POLL_SECONDS, Store, pause
from distil_tl.distributed.watchdog.client import RankWatchdog, connect_to_hub, open_hub
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger

_RESULT = "what rank 0 found"


def meet(
    store: Store, mine: RankDevice, launch: Launch, config: DistributedConfig, watchdog: RankWatchdog, store_host: str
) -> int:
    """Compare the devices of all ranks, and start the watchdog of this one. Returns the number of nodes.

    Args:
        store_host: where the ranks reach the store, and rank 0.

    Raises:
        UserError: on all ranks, if their devices do not fit together.
        DistStoreError: a rank does not arrive in time.
    """
    keys = [f"device {rank}" for rank in range(launch.world_size)]
    store.set(keys[launch.rank], json.dumps(dataclasses.asdict(mine)))
    heartbeat = config.heartbeat_seconds
    own = {
        "rank": launch.rank, "world_size": launch.world_size, "host": mine.host, "heartbeat": heartbeat,
        "tick": seconds_between_heartbeats(launch.world_size, heartbeat),
    }  # fmt: skip
    if launch.rank == 0:
        _wait(store, keys, POLL_SECONDS + launch.world_size / 2000)
        devices = [RankDevice(**json.loads(text)) for text in store.get_all(keys)]
        problem, nodes = problem_of(devices, config.backend), len({device.host for device in devices})
        hub = {} if problem else _start_hub(watchdog, own, everywhere=nodes > 1)
        store.set(_RESULT, json.dumps({"problem": problem, "nodes": nodes, "hub": hub}))
    else:
        _wait(store, [_RESULT], pause(launch.world_size))
    answer = json.loads(store.get(_RESULT))
    if answer["problem"]:
        # Rank 0 may serve the store: the others must read the answer before it exits.
        with suppress(dist.DistError):  # it may be gone as soon as all ranks are counted
            store.count_ranks("refused", launch.world_size, LEAVE_SECONDS)
        raise UserError(answer["problem"])
    if launch.rank > 0 and answer["hub"]:
        # Rank 0 runs where the ranks reach the store. Its own name may not be known to the others.
        hosts = ["127.0.0.1"] if answer["nodes"] == 1 else [store_host, answer["hub"]["hub_host"]]
        _start_other(watchdog, {**answer["hub"], **own}, hosts)
    return int(answer["nodes"])


def seconds_between_heartbeats(world_size: int, heartbeat: float | None) -> float:
    """One, but more for many ranks, as all send to one watchdog; and several within the time that a rank has."""
    return min(max(1.0, world_size / 256), float("inf") if heartbeat is None else heartbeat / 10)


_UNWATCHED = "so a dead or frozen rank is noticed only after distributed.timeout_seconds"


def _start_hub(watchdog: RankWatchdog, own: dict[str, Any], *, everywhere: bool) -> dict[str, Any]:
    """Start the watchdog of rank 0. Returns what the others need to know; nothing if it can't be started."""
    try:
        listener, hub = open_hub(everywhere)
        hub["hub_host"] = own["host"]
        watchdog.start({**hub, **own}, listener)
    except OSError as error:
        logger.warning("can't start the watchdog of rank 0 (%s), %s", error, _UNWATCHED)
        return {}
    return hub


def _start_other(watchdog: RankWatchdog, settings: dict[str, Any], hosts: list[str]) -> None:
    """Start the watchdog of another rank, connected to that of rank 0."""
    rank, port = settings["rank"], settings["port"]
    try:
        connection: socket.socket | None = connect_to_hub(hosts, port)
    except OSError as error:
        connection = None
        logger.error(
            "rank %d can't reach the watchdog of rank 0 at %s:%d (%s), %s", rank, hosts[-1], port, error, _UNWATCHED
        )
    try:
        watchdog.start(settings, connection)
    except OSError as error:
        logger.error("can't start the watchdog of rank %d (%s), %s", rank, error, _UNWATCHED)


def _wait(store: Store, keys: list[str], seconds: float) -> None:
    """Wait until all keys are set, for as long as the timeout of the store. Looks every few `seconds`."""
    deadline = time.monotonic() + store.seconds
    while not store.check(*keys):
        store.raise_if_ended()
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys[:1000]) if not store.check(key)] if len(keys) > 1 else [0]
            raise dist.DistStoreError(f"{some_ranks(missing)} did not answer in {store.seconds:g} s")
        time.sleep(seconds)
