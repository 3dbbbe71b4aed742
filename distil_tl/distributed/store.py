"""The store through which ranks meet and exchange words, so asked that no answer is waited for for ever."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from distil_tl.distributed.launch_env import Launch
from distil_tl.utils.command import STUCK
from distil_tl.utils.errors import LostRanksError

Result = TypeVar("Result")


def within(seconds: float, work: Callable[[], Result], *, asking: str = "the process that the ranks meet in") -> Result:
    """What `work` returns or raises, in a thread that is left behind when it takes longer, or a signal comes first.

    A store lives in one of the processes. Once that one is frozen torch reads from it for ever, whatever the timeout
    it was given: when it connects, when a process group is made, and in every question.

    Raises:
        DistStoreError: no answer in that time.
    """
    results, faults = list[Result](), list[BaseException]()

    def ask() -> None:
        try:
            results.append(work())
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=ask, name=STUCK, daemon=True)
    thread.start()
    thread.join(seconds)
    if faults:
        raise faults[0]
    if not results:
        raise dist.DistStoreError(f"no answer in {seconds:g} s from {asking}")
    return results[0]


class Store:
    """A torch store whose every question is answered `within` so many seconds, or raises DistStoreError."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self.inner = inner
        self.seconds = seconds

    def set(self, key: str, value: str) -> None:
        within(self.seconds, lambda: self.inner.set(key, value))

    def get(self, key: str) -> str:
        return self.get_all([key])[0]

    def get_all(self, keys: Sequence[str]) -> list[str]:
        return within(self.seconds, lambda: [value.decode() for value in self.inner.multi_get(list(keys))])

    def check(self, *keys: str) -> bool:
        return within(self.seconds, lambda: bool(self.inner.check(list(keys))))

    def add(self, key: str, amount: int) -> int:
        return within(self.seconds, lambda: int(self.inner.add(key, amount)))

    def waiting(self, seconds: float) -> Store:
        """The same store, asked for so long at most."""
        return Store(self.inner, min(seconds, self.seconds))

    def below(self, name: str) -> Store:
        """The same store, with keys of its own."""
        return Store(PrefixStore(name, self.inner), self.seconds)


def connect(launch: Launch, timeout: float) -> Store:
    """The store of this attempt's ranks, once this one has found it.

    Raises:
        LostRanksError: the other ranks are not there within `timeout` seconds.
        DistError: nor is the store.
    """
    assert launch.url is not None
    url, patience = launch.url, timedelta(seconds=timeout)
    # Longer than torch itself takes to say what it misses.
    inner, _, _ = within(
        2 * timeout + 1, lambda: next(iter(rendezvous(url, launch.rank, launch.world_size, timeout=patience)))
    )
    store = Store(inner, timeout)
    return store.below(_attempt(store.below("meeting"), launch, timeout)) if launch.launcher == "torchrun" else store


def _attempt(store: Store, launch: Launch, timeout: float) -> str:
    """A name for this attempt that all its ranks agree on.

    After a restart torchrun's store still holds what the ranks of the attempt before wrote, and its count of restarts
    differs between nodes. The name is made from a word of each rank; what is left of earlier ranks can't agree on it.
    """
    here, agreed = ([f"{word} {rank}" for rank in range(launch.world_size)] for word in ("here", "agreed"))
    store.set(here[launch.rank], secrets.token_hex(8))
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if store.check(*here):
            name = hashlib.sha256("".join(store.get_all(here)).encode()).hexdigest()
            store.set(agreed[launch.rank], name)
            if store.check(*agreed) and set(store.get_all(agreed)) == {name}:
                return name
        time.sleep(0.05 + launch.world_size / 2000)  # each asks for all keys
    raise LostRanksError(
        f"rank {launch.rank} did not meet the other ranks within distributed.timeout_seconds={timeout:g}; see their log"
    )
