"""The key-value store that connects the ranks. Every request has a timeout."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from distil_tl.utils.errors import LostRanksError, PreemptedError, RestartError
from distil_tl.utils.threads import CallTimeoutError, call_with_timeout

if TYPE_CHECKING:
    from distil_tl.distributed.launch_env import Launch
    from distil_tl.distributed.watchdog.client import RankWatchdog

Result = TypeVar("Result")

POLL_SECONDS = 0.05  # at least, between two requests of a rank that waits
POLLS_PER_SECOND = 5000  # at most, of all ranks: one process serves them
LEAVE_SECONDS = 10  # for the other ranks to notice that one leaves
_DEPARTURE = "departure"  # the key under which a rank writes why it leaves before the others know


def pause(ranks: int) -> float:
    """Seconds between two requests of each of the ranks that wait."""
    return POLL_SECONDS + ranks / POLLS_PER_SECOND


def within(
    seconds: float,
    work: Callable[[], Result],
    *,
    peer: str = "the store of the ranks",
    watchdog: RankWatchdog | None = None,
) -> Result:
    """Call `work`, which needs another process, with a timeout. Returns or raises what `work` does.

    One of the processes serves the store. If that process is frozen, torch ignores its own timeout and waits without
    end: while it connects, while it forms a process group, and for the answer to each request.

    Args:
        watchdog: of this rank; the wait ends when it reports a lost rank.

    Raises:
        DistStoreError: no answer from `peer` in that time, or a rank is lost.
    """

    def check() -> None:
        raise_if_lost(watchdog)

    try:
        return call_with_timeout(seconds, work, check if watchdog is not None else None)
    except CallTimeoutError:
        raise dist.DistStoreError(f"no answer in {seconds:g} s from {peer}") from None


def raise_if_lost(watchdog: RankWatchdog | None) -> None:
    """Raise a DistStoreError that names the rank that the watchdog reports as lost, if there is one."""
    lost = None if watchdog is None else watchdog.lost()
    if lost is not None:
        raise dist.DistStoreError(lost)


class Store:
    """A torch store with a timeout for every request. `watchdog` is that of this rank, once it has one.

    Raises:
        DistStoreError: by every method, when there is no answer in `seconds`.
    """

    def __init__(self, inner: Any, seconds: float, watchdog: RankWatchdog | None = None) -> None:
        self.inner = inner
        self.seconds = seconds
        self.watchdog = watchdog

    def set(self, key: str, value: str) -> None:
        within(self.seconds, lambda: self.inner.set(key, value))

    def set_all(self, keys: Sequence[str], values: Sequence[str]) -> None:
        within(self.seconds, lambda: self.inner.multi_set(list(keys), list(values)))

    def get(self, key: str) -> str:
        return self.get_all([key])[0]

    def get_all(self, keys: Sequence[str]) -> list[str]:
        return within(self.seconds, lambda: [value.decode() for value in self.inner.multi_get(list(keys))])

    def check(self, *keys: str) -> bool:
        """Whether all keys are set."""
        return within(self.seconds, lambda: bool(self.inner.check(list(keys))))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter. Returns its new value."""
        return within(self.seconds, lambda: int(self.inner.add(key, amount)))

    def with_timeout(self, seconds: float) -> Store:
        """The same store, with at most this timeout."""
        return Store(self.inner, min(seconds, self.seconds), self.watchdog)

    def below(self, prefix: str) -> Store:
        """The same store, with its keys under `prefix`."""
        return Store(PrefixStore(prefix, self.inner), self.seconds, self.watchdog)

    def count_ranks(self, key: str, expected: int, timeout: float, *, leaving: bool = False) -> None:
        """Count this rank under `key`, and wait until `expected` ranks are counted or the timeout ends.

        Raises:
            PreemptedError, RestartError: of another rank that leaves, unless this rank is itself `leaving`.
            DistStoreError: another rank is lost, with the same exception.
        """
        deadline = time.monotonic() + timeout
        counted = self.add(key, 1)
        while counted < expected and time.monotonic() < deadline:
            if not leaving:
                self.raise_if_ended()
            time.sleep(pause(expected))
            counted = self.add(key, 0)

    def set_departure(self, error: PreemptedError | RestartError) -> None:
        """Tell the other ranks why this one leaves: a signal stopped it, or all must start again."""
        self.set(_DEPARTURE, json.dumps([str(error), error.settings if isinstance(error, RestartError) else None]))

    def raise_if_ended(self) -> None:
        """Raise the error of another rank that leaves, or a DistStoreError if the watchdog reports a lost rank."""
        self.raise_departure()
        raise_if_lost(self.watchdog)

    def raise_departure(self) -> None:
        """Raise the PreemptedError or RestartError of another rank, if one leaves."""
        if self.check(_DEPARTURE):
            message, settings = json.loads(self.get(_DEPARTURE))
            raise PreemptedError(message) if settings is None else RestartError(message, settings)


def connect(launch: Launch, timeout: float) -> Store:
    """The store that the ranks of this start share.

    Raises:
        LostRanksError: the other ranks do not connect within `timeout` seconds.
        DistError: the store can't be reached.
    """
    assert launch.url is not None
    url, torch_timeout = launch.url, timedelta(seconds=timeout)
    # Longer than torch's own timeout, whose error says which ranks are missing.
    inner, _, _ = within(
        2 * timeout + 1, lambda: next(iter(rendezvous(url, launch.rank, launch.world_size, timeout=torch_timeout)))
    )
    store = Store(inner, timeout)
    if launch.launcher != "torchrun":
        return store
    return store.below(_agree_on_name(store.below("meeting"), launch, timeout))


def _agree_on_name(store: Store, launch: Launch, timeout: float) -> str:
    """A name for this start of the ranks, equal on all of them and different from that of an earlier start.

    After a restart torchrun's store still holds the keys of earlier ranks, and its count of restarts may differ
    between nodes. So each rank contributes a random value, and rank 0 makes a name of all of them. A rank confirms a
    name only if its own value is part of it, and the name is decided when all have confirmed it. Only rank 0 requests
    the keys of all.
    """
    own = secrets.token_hex(8)
    store.set(f"random {launch.rank}", own)
    deadline = time.monotonic() + timeout
    names: list[str] = []  # that this rank has confirmed; only the last, unless a rank of an earlier start interferes
    answer, mine = f"answer {launch.rank}", f"confirmed {launch.rank}"
    while time.monotonic() < deadline:
        if launch.rank == 0:
            _name_ranks(store, own, launch.world_size)
        if store.check(answer):
            value, name = store.get(answer).split()
            if value == own and name not in names[-1:]:
                store.set(mine, name)
                names.append(name)
        for name in names:
            if store.check(f"decided {name}"):
                return name
        time.sleep(pause(launch.world_size))
    raise LostRanksError(
        f"rank {launch.rank} did not connect to the other ranks within distributed.timeout_seconds={timeout:g}; "
        f"see the logs of the others"
    )


def _name_ranks(store: Store, own: str, ranks: int) -> None:
    """On rank 0: answer each rank with its random value and the name, or decide a name that all have confirmed."""
    random, confirmed, answers = (
        [f"{key} {rank}" for rank in range(ranks)] for key in ("random", "confirmed", "answer")
    )
    if not store.check(*random):
        return
    values = store.get_all(random)
    if values[0] != own:  # another rank 0 has just started
        return
    name = hashlib.sha256("".join(values).encode()).hexdigest()
    if store.check(*confirmed) and set(store.get_all(confirmed)) == {name}:
        store.set(f"decided {name}", "")
    elif not store.check(answers[0]) or store.get(answers[0]) != f"{own} {name}":
        store.set_all(answers, [f"{value} {name}" for value in values])
