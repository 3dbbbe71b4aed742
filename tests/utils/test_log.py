"""Progress of long work, in a log without a terminal."""

from __future__ import annotations

import logging

import pytest

from distil_tl.utils import log
from distil_tl.utils.log import Progress, logger


def test_a_log_is_not_silent_for_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(log.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    with Progress("features", 40, show=True) as bar, Progress("of another rank", 40, show=False) as silent:
        for step in range(1, 41):
            now += 3
            bar.advance()
            silent.advance()
            if step == 22:
                bar.show("figures of its own")
    shown = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert shown == [
        "features  10%", "features  20%", "features  30%", "features  40%", "features  50%",
        "features  figures of its own",
        "features  65%", "features  75%", "features  85%", "features  95%",
    ]  # fmt: skip
