"""Signals: all ranks stop or save after the same step."""

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
    """What a rank requests of all ranks; the highest request wins."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2


class AllRanksStopError(Exception):
    """All ranks have agreed to stop, during work that can be repeated from its beginning."""


class StopSignal:
    """Signal handlers that only record that a signal came. As a context manager it restores the former handlers.

    Before `defer` there is nothing to save, and the first signal ends the process with a PreemptedError. Signals: INT
    (Ctrl-C), TERM (preemption, scancel), USR2 (submitit's warning before a time limit).
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._deferred = False
        self._former: dict[int, signal._HANDLER] = {}

    def __bool__(self) -> bool:
        """Whether a signal came."""
        return self.name is not None

    def defer(self) -> None:
        """From now on only record signals; the ranks then agree to stop."""
        self._deferred = True

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        repeated, self.name = self.name is not None, signal.Signals(number).name
        if not self._deferred and not repeated:
            raise PreemptedError(f"stopped by {self.name} before training started; run the same command to start again")

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class Agreement:
    """Turns the request of one rank into the same action of all ranks after the same step.

    Every rank calls `exchange` once a step. The requests of one step are reduced while the next step computes, so that
    no rank waits; the result is one step late, and equal on all ranks.

    Args:
        request: what this rank requests now.
    """

    def __init__(self, info: DistInfo, request: Callable[[], Request]) -> None:
        self._alone = info.world_size == 1
        self._request = request
        self._highest = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def exchange(self) -> Request:
        """The highest request of the call before, and start to reduce that of now."""
        if self._alone:
            return self._request()
        agreed = self._result()
        self._highest.fill_(self._request())
        self._pending = dist.all_reduce(self._highest, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def exchange_now(self) -> Request:
        """The highest request of now. Waits for the other ranks: for places such as the end of an epoch."""
        earlier = self.exchange()
        return max(self._result(), earlier)

    def raise_if_stopping(self) -> None:
        """Like `exchange`, for work that can be repeated from its beginning.

        Raises:
            AllRanksStopError: on all ranks.
        """
        if self.exchange() is Request.STOP:
            raise AllRanksStopError

    def _result(self) -> Request:
        """The result of the reduction that runs, if one does."""
        if self._alone:
            return self._request()
        if self._pending is None:
            return Request.CONTINUE
        self._pending.wait()
        self._pending = None
        return Request(int(self._highest.item()))
