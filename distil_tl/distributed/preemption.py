"""Signals: all ranks stop or save after the same step."""

from __future__ import annotations

import enum
import os
import signal
import sys
import time
import types
from collections.abc import Callable

import torch
import torch.distributed as dist

from distil_tl.distributed.process_group import DistInfo
from distil_tl.utils.errors import PreemptedError, RestartError
from distil_tl.utils.signals import STOP_SIGNALS, note_stop

EXCHANGE_SECONDS = 0.05  # aimed at between two exchanges of requests; several times what one takes on many nodes
_EARLIER = "DISTIL_TL_SIGNAL"  # of the environment: a signal that came before this process started again
MOST_STEPS = 16  # between two exchanges: they come late when steps suddenly get slower


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
    (Ctrl-C), TERM (preemption, scancel), USR2 (submitit's warning before a time limit), HUP (a lost connection), unless
    it is ignored, as after nohup. A signal that was blocked before, as in a batch job, is ignored afterwards:
    it must not end the process, or squeue, while the job is requeued.

    Args:
        before: what has not happened yet, in the message of a signal that comes before `defer`.
    """

    def __init__(self, before: str = "training started") -> None:
        self._before = before
        self.name: str | None = None
        self._deferred = False
        self._former: dict[int, signal._HANDLER] = {}
        self._blocked: set[int] = set()
        self._lost: str | None = None  # a signal that came in a destructor
        self._former_hook = sys.unraisablehook

    def __bool__(self) -> bool:
        """Whether a signal came."""
        return self.name is not None

    def defer(self) -> None:
        """From now on only record signals; the ranks then agree to stop.

        Raises:
            PreemptedError: a signal came before, in a destructor.
        """
        self._deferred = True
        if self._lost is not None:
            raise self._too_early(self._lost)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        repeated, self.name = self.name is not None, signal.Signals(number).name
        note_stop(self.name)
        if not self._deferred and not repeated:
            raise self._too_early(self.name)

    def _too_early(self, name: str) -> PreemptedError:
        return PreemptedError(f"stopped by {name} before {self._before}; run the same command to start again")

    def _ignored(self, event: sys.UnraisableHookArgs) -> None:
        """Print nothing for a signal in a destructor, where Python ignores exceptions: the run ends a little later."""
        if not isinstance(event.exc_value, PreemptedError):
            self._former_hook(event)
        elif not self._deferred:
            self._lost, self.name = self.name, None  # so that the next signal ends the run at once

    def __enter__(self) -> StopSignal:
        self._former_hook, sys.unraisablehook = sys.unraisablehook, self._ignored
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._handle)
        # A batch job, and a process that starts again, have blocked them.
        self._blocked = set(signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS))
        self.name = os.environ.pop(_EARLIER, self.name)
        note_stop(self.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        restarts = kind is not None and issubclass(kind, RestartError)
        if restarts and self.name is not None:
            os.environ[_EARLIER] = self.name
        for number, handler in self._former.items():
            after = signal.SIG_IGN if number in self._blocked else handler
            signal.signal(number, _note if restarts else after)
        sys.unraisablehook = self._former_hook
        note_stop(None)


def _note(number: int, frame: types.FrameType | None) -> None:
    """Keep a signal for when this process has started again."""
    os.environ[_EARLIER] = signal.Signals(number).name


class Agreement:
    """Turns the request of one rank into the same action of all ranks after the same step.

    Every rank calls `exchange` once a step. The requests of one step are reduced while the next steps compute, so that
    no rank waits; the result is late, and equal on all ranks. For steps of a few milliseconds a reduction each would
    take longer than the step. So the ranks exchange only every few steps: as many as take EXCHANGE_SECONDS on the
    slowest rank. That number is agreed with the requests, and used after the next exchange.

    Args:
        request: what this rank requests now.
    """

    def __init__(self, info: DistInfo, request: Callable[[], Request]) -> None:
        self._alone = info.world_size == 1
        self._request = request
        self._reduced = torch.zeros(2, dtype=torch.int32)  # the highest request; minus the smallest number of steps
        self._pending: dist.Work | None = None
        self._steps = 1  # between two exchanges
        self._left = 0  # until the next one
        self._began = time.monotonic()

    def exchange(self) -> Request:
        """The highest request of the exchange before, and start to reduce that of now; or CONTINUE between two."""
        if self._alone:
            return self._request()
        self._left -= 1
        if self._left > 0:
            return Request.CONTINUE
        return self._exchange()

    def exchange_now(self) -> Request:
        """The highest request of now. Waits for the other ranks: for places such as the end of an epoch."""
        if self._alone:
            return self._request()
        earlier = self._exchange()
        highest = max(self._result(), earlier)
        self._steps, self._left = 1, 0  # what follows may have slower steps
        return highest

    def raise_if_stopping(self) -> None:
        """Like `exchange`, for work that can be repeated from its beginning.

        Raises:
            AllRanksStopError: on all ranks.
        """
        if self.exchange() is Request.STOP:
            raise AllRanksStopError

    def _exchange(self) -> Request:
        taken, agreed = self._steps - max(self._left, 0), self._result()
        now = time.monotonic()
        fit = int(EXCHANGE_SECONDS * max(taken, 1) / max(now - self._began, 1e-9))
        request = self._request()
        if request is Request.SAVE and agreed is Request.SAVE:  # it is saved next
            request = Request.CONTINUE
        self._reduced[0] = int(request)
        self._reduced[1] = -max(1, min(fit, MOST_STEPS, 2 * self._steps))
        self._pending = dist.all_reduce(self._reduced, op=dist.ReduceOp.MAX, async_op=True)
        self._left, self._began = self._steps, now
        return agreed

    def _result(self) -> Request:
        """The result of the reduction that runs, if one does."""
        if self._pending is None:
            return Request.CONTINUE
        self._pending.wait()
        self._pending = None
        highest, steps = self._reduced.tolist()
        self._steps = -steps
        return Request(highest)
