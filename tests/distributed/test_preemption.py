"""Signals: before training the run ends at once, wherever it is; later all ranks stop after the same step."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.preemption import MOST_STEPS, Agreement, Request, StopSignal
from distil_tl.distributed.process_group import init_distributed
from distil_tl.models import timm_models
from distil_tl.train import main
from distil_tl.utils.errors import PreemptedError, RestartError
from distil_tl.utils.signals import STOP_SIGNALS
from tests.helpers.ranks import rank, run_ranks


@pytest.fixture(autouse=True)
def _same_handlers_afterwards() -> Iterator[None]:
    """A stopped run keeps its handlers until the process ends."""
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def raise_signal(*_args: object, **_options: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGTERM)
    raise OSError("the handler has not raised")


def test_a_library_that_handles_errors_of_its_download_does_not_catch_a_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", raise_signal)
    with StopSignal(), pytest.raises(PreemptedError, match="stopped by SIGTERM before training started"):
        timm_models._create("vit_tiny_patch16_224", True)


@pytest.mark.parametrize("during", ["look_for_start", "open_splits", "download_weights", "build"])
def test_a_signal_in_start_up_ends_the_run_with_status_3(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], during: str
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    train: Any = importlib.import_module("distil_tl.train")
    monkeypatch.setattr(train, during, raise_signal)
    assert main([*small, f"run_dir={tmp_path}/run"]) == 3
    assert "stopped by SIGTERM before training started; run the same command to start again" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_connection_is_like_term_unless_it_is_ignored(ignored: bool) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            stop.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name == (None if ignored else "SIGHUP")
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_signal_before_a_selection_names_it() -> None:
    with (
        StopSignal("the selection started"),
        pytest.raises(PreemptedError, match="stopped by SIGTERM before the selection started"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_was_blocked_before_ends_nothing_afterwards() -> None:
    """A batch job blocks it from the start; another one may come while the job is requeued."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # other threads of the tests do not block it
    with pytest.raises(PreemptedError, match="stopped by SIGUSR2 before training"), StopSignal():
        pass
    os.kill(os.getpid(), signal.SIGUSR2)


def test_a_signal_in_a_destructor_stops_the_run_later_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Deleted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    class Faulty:
        def __del__(self) -> None:
            raise OSError("other errors are printed")

    former = sys.unraisablehook
    try:
        sys.unraisablehook = sys.__unraisablehook__
        with StopSignal() as stop:
            Deleted()
            assert capsys.readouterr().err == ""
            with pytest.raises(PreemptedError, match="stopped by SIGTERM"):
                stop.defer()
        with StopSignal():
            Deleted()
            with pytest.raises(PreemptedError, match="stopped by SIGINT"):
                signal.raise_signal(signal.SIGINT)
        with StopSignal() as stop:
            stop.defer()
            Deleted()
            assert stop.name == "SIGTERM"
            Faulty()
            assert "other errors are printed" in capsys.readouterr().err
        assert sys.unraisablehook is sys.__unraisablehook__
    finally:
        sys.unraisablehook = former


def test_a_signal_before_the_process_starts_again_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    former = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("DISTIL_TL_SIGNAL", raising=False)
    with contextlib.suppress(RestartError), StopSignal() as stop:
        stop.defer()
        raise RestartError("out of memory", {})
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)  # handlers run between two lines
    signal.signal(signal.SIGTERM, former)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # as before execv
    with StopSignal() as stop:
        assert stop.name == "SIGTERM"
        assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert "DISTIL_TL_SIGNAL" not in os.environ


class Steps:
    """Runs steps of some seconds until all ranks stop. Rank `by` asks for it at `stop_at`."""

    def __init__(self, by: int, stop_at: int, seconds: float) -> None:
        self.by, self.stop_at, self.seconds, self.step = by, stop_at, seconds, 0
        self.exchanges: list[int] = []

    def request(self) -> Request:
        self.exchanges.append(self.step)
        return Request.STOP if rank() == self.by and self.step >= self.stop_at else Request.CONTINUE


def stop_together(by: int, stop_at: int, seconds: float) -> tuple[int, list[int]]:
    steps = Steps(by, stop_at, seconds)
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu", timeout_seconds=60)) as info:
        agreement = Agreement(info, steps.request)
        for steps.step in range(1, 10_000):
            time.sleep(steps.seconds)
            if agreement.exchange() is Request.STOP:
                break
        first = steps.step
        agreement.exchange_now()
        assert agreement.exchange_now() is Request.STOP  # of now
    return first, steps.exchanges[:-2]


def test_fast_steps_exchange_rarely_and_stop_together() -> None:
    found = run_ranks(2, stop_together, 1, 60, 0.001)
    stopped, exchanged = found[0]
    assert [one[0] for one in found] == [stopped] * 2
    assert found[1][1] == exchanged  # the same steps on all ranks
    assert 60 <= stopped <= 60 + 2 * MOST_STEPS
    gaps = {after - before for before, after in itertools.pairwise(exchanged)}
    assert max(gaps) > 1, exchanged
    assert max(gaps) <= MOST_STEPS


def test_slow_steps_exchange_each_time() -> None:
    stopped, exchanged = run_ranks(2, stop_together, 0, 3, 0.06)[0]
    assert exchanged == list(range(1, stopped + 1))
    assert stopped == 4


def test_a_checkpoint_that_is_due_is_asked_for_once() -> None:
    assert run_ranks(2, saves) == [[False, True, False]] * 2


def saves() -> list[bool]:
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu", timeout_seconds=60)) as info:
        due = [True]
        agreement = Agreement(info, lambda: Request.SAVE if due[0] and info.is_main else Request.CONTINUE)
        found = []
        for _ in range(3):
            time.sleep(0.06)
            found.append(agreement.exchange() is Request.SAVE)
            due[0] = not any(found)
        agreement.exchange_now()
    return found
