"""Being asked to stop or to save, and doing it together."""

from __future__ import annotations

import enum
import signal
import types
from collections.abc import Callable

import torch
import torch.distributed as dist

from distil_tl.distributed.process_group import DistInfo
from distil_tl.utils.errors import PreemptedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Request(enum.IntEnum):
    """What a rank wants all of them to do; the highest wins."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class StopAgreedError(Exception):
    """All ranks have agreed to stop, in the middle of something that they can do again."""


class StopRequest:
    """Notes that a signal asked this process to stop; the handler does nothing else, however often it is called.

    Until `hold` there is nothing to save, and a signal ends the process at once, with a PreemptedError. A context
    manager that puts the former handlers back. Signals: INT (Ctrl-C), TERM (preemption, scancel), USR2 (submitit's
    warning before a time limit).
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._held = False
        self._former: dict[int, signal._HANDLER] = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def hold(self) -> None:
        """From here on signals only leave a note, for the ranks to agree on."""
        self._held = True

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        again, self.name = self.name is not None, signal.Signals(number).name
        if not self._held and not again:
            raise PreemptedError(f"stopped by {self.name} before training began; the same command starts again")

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class Agreement:
    """Turns "some rank asks for it" into "all ranks do it after the same step".

    `poll` is called once a step by every rank. The requests of one step are combined while the next step computes,
    so agreeing costs no waiting; the answer is one step late, and the same step everywhere.
    """

    def __init__(self, info: DistInfo, request: Callable[[], Request]) -> None:
        self._alone = info.world_size == 1
        self._request = request
        self._highest = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def poll(self) -> Request:
        """What all ranks do here."""
        if self._alone:
            return self._request()
        agreed = self._settle()
        self._highest.fill_(self._request())
        self._pending = dist.all_reduce(self._highest, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def ask(self) -> Request:
        """Like `poll`, but about this very moment: for places that may wait, such as the end of an epoch."""
        earlier = self.poll()
        return max(self._settle(), earlier)

    def check(self) -> None:
        """`poll`, for work that can be done again from its beginning.

        Raises:
            StopAgreedError: on all ranks alike.
        """
        if self.poll() is Request.STOP:
            raise StopAgreedError

    def _settle(self) -> Request:
        if self._alone:
            return self._request()
        if self._pending is None:
            return Request.GO_ON
        self._pending.wait()
        self._pending = None
        return Request(int(self._highest.item()))
