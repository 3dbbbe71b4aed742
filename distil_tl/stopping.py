"""Being asked to stop, and stopping together."""

from __future__ import annotations

import signal
import types
from collections.abc import Callable

import torch
import torch.distributed as dist

from distil_tl.distributed import DistInfo

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Notes that a signal asked this process to stop; the handler does nothing else.

    A context manager that puts the former handlers back. Signals: INT (Ctrl-C), TERM (preemption, scancel), USR2
    (submitit's warning before a time limit).
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._former: dict[int, signal._HANDLER] = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class AgreedStop:
    """Turns "some rank was asked to stop" into "all ranks stop after the same step".

    `poll` is called once a step by every rank. The flags of one step are combined while the next step computes, so
    agreeing costs no waiting; the stop is one step late, and the same step everywhere.
    """

    def __init__(self, info: DistInfo, requested: Callable[[], bool]) -> None:
        self._alone = info.world_size == 1
        self._requested = requested
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def poll(self) -> bool:
        """Whether all ranks stop here."""
        if self._alone:
            return self._requested()
        agreed = self._settle()
        self._flag.fill_(int(self._requested()))
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def ask(self) -> bool:
        """Like `poll`, but about this very moment: for places that may wait, such as the end of an epoch."""
        earlier = self.poll()
        return self._settle() or earlier

    def _settle(self) -> bool:
        if self._alone:
            return self._requested()
        if self._pending is None:
            return False
        self._pending.wait()
        self._pending = None
        return bool(self._flag.item())
