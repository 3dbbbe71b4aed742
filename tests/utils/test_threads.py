"""Calls with a timeout, in threads that may have to be abandoned."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from distil_tl.utils.threads import CallTimeoutError, available_cpus, call_with_timeout, has_abandoned_threads


def test_a_call_gives_what_the_work_returns() -> None:
    assert call_with_timeout(5, lambda: 3) == 3
    assert call_with_timeout(5, lambda: None) is None


def test_a_call_raises_what_the_work_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(5, lambda: 1 / 0)


def test_work_that_takes_too_long_is_abandoned() -> None:
    release = threading.Event()
    with pytest.raises(CallTimeoutError):
        call_with_timeout(0.1, release.wait)
    assert has_abandoned_threads()
    release.set()
    deadline = time.monotonic() + 30
    while has_abandoned_threads():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class InterruptedBySignalError(BaseException):
    pass


def test_a_signal_interrupts_the_wait() -> None:
    def raises(*_: object) -> None:
        raise InterruptedBySignalError

    before = signal.signal(signal.SIGALRM, raises)
    release, began = threading.Event(), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(InterruptedBySignalError):
            call_with_timeout(60, release.wait)
    finally:
        signal.signal(signal.SIGALRM, before)
        release.set()
    assert time.monotonic() - began < 30


def test_there_is_at_least_one_cpu() -> None:
    assert available_cpus() >= 1
