"""Exchange of JSON between the ranks, in which no rank waits for another without a limit.

It uses a store of its own, which does not wait until all ranks are connected: rank 0 must be able to say which ranks
are missing.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.store import Store, within
from distil_tl.doctor.lines import first_line
from distil_tl.utils.errors import UserError

POLL_SECONDS = 0.05
LONGEST = 3600.0  # seconds that the other ranks wait for the checks of rank 0, such as a scan of many images


class Meeting:
    """The ranks of a start. A single process meets only itself.

    Raises:
        UserError: the store can't be reached within `seconds`; this rank prints it.
    """

    def __init__(self, launch: Launch, seconds: float) -> None:
        self.launch = launch
        self._own: dict[str, str] = {}
        self.store: Store | None = None
        if launch.url is not None:
            self.store = _connect(launch, seconds)

    @property
    def is_main(self) -> bool:
        return self.launch.rank == 0

    def tell(self, key: str, value: Any) -> None:
        """Tell all ranks something."""
        text = json.dumps(value)
        if self.store is None:
            self._own[key] = text
        else:
            self.store.set(key, text)

    def hear(self, key: str, seconds: float) -> Any:
        """What a rank tells under `key`; None if it does not within `seconds`, or the store is gone."""
        return self.hear_all([key], seconds).get(key)

    def hear_all(self, keys: Iterable[str], seconds: float) -> dict[str, Any]:
        """What is told under the keys within `seconds`: not all of them if some are not told, or the store is gone."""
        found: dict[str, Any] = {}
        missing, deadline = list(keys), time.monotonic() + seconds
        while missing:
            try:
                arrived = [key for key in missing if self._has(key)]
                found |= {key: self._get(key) for key in arrived}
            except dist.DistError:
                return found
            missing = [key for key in missing if key not in found]
            if time.monotonic() > deadline:
                break
            if missing:
                time.sleep(POLL_SECONDS)
        return found

    def from_ranks(self, what: str, ranks: Sequence[int], seconds: float) -> dict[int, Any]:
        """What ranks have told by `tell_as_rank(what, ...)`, by rank."""
        found = self.hear_all([_key(what, rank) for rank in ranks], seconds)
        return {rank: found[key] for rank in ranks if (key := _key(what, rank)) in found}

    def tell_as_rank(self, what: str, value: Any) -> None:
        """Tell rank 0 something that each rank tells."""
        self.tell(_key(what, self.launch.rank), value)

    def _has(self, key: str) -> bool:
        return key in self._own if self.store is None else self.store.check(key)

    def _get(self, key: str) -> Any:
        return json.loads(self._own[key] if self.store is None else self.store.get(key))


def _key(what: str, rank: int) -> str:
    return f"{what} of rank {rank}"


def _connect(launch: Launch, seconds: float) -> Store:
    assert launch.url is not None
    parts = urlsplit(launch.url)
    host, port = parts.hostname or os.environ["MASTER_ADDR"], parts.port or int(os.environ["MASTER_PORT"])
    # With torchrun's c10d rendezvous its agent serves the store; else rank 0 does.
    by_agent = launch.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = launch.rank == 0 and not by_agent

    def connect() -> TCPStore:
        if not serves:
            _wait_for_server(host, port, seconds)  # torch itself would print a C++ stack trace
        return TCPStore(
            host, port, launch.world_size, serves,
            timeout=timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip

    try:
        inner = within(2 * seconds + 1, connect, peer=f"{host}:{port}")
    except (OSError, RuntimeError, ValueError) as error:  # also dist.DistError
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        what, remedy = (
            "reach",
            "is rank 0 running, and can this machine reach that address (firewall, name resolution)?",
        )
        if serves:
            what, remedy = "serve", "is that port free, and is it an address of this machine?"
        raise UserError(
            f"rank {launch.rank} can't {what} the store of the ranks at {host}:{port} ({reason}): {remedy}",
            one_rank=True,
        ) from None
    # A restart by torchrun uses the same store again.
    return Store(inner, seconds).below(f"doctor {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")


def _wait_for_server(host: str, port: int, seconds: float) -> None:
    """Wait until a process listens at an address. Raises the last OSError if none does within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, seconds)).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
        else:
            return
