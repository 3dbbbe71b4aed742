"""The limit of open files and connections."""

from __future__ import annotations

import logging
import resource

import pytest

from distil_tl.distributed.sockets import allow_connections
from tests.helpers.ranks import run_ranks


def limits_after(soft: int, hard: int, ranks: int) -> tuple[int, int]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allow_connections(ranks)
    return resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.mark.parametrize(
    ("soft", "hard", "ranks", "after"),
    [(400, 4000, 8, 528), (1024, 4000, 1000, 2512), (1024, 4000, 8, 1024), (1024, 2000, 4096, 2000)],
)
def test_the_limit_is_raised_as_far_as_many_ranks_need(soft: int, hard: int, ranks: int, after: int) -> None:
    assert run_ranks(1, limits_after, soft, hard, ranks) == [(after, hard)]


def test_a_limit_that_is_too_low_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        allow_connections(1000)
    assert "may open 1024 files and connections, and 1000 ranks may need 2512" in caplog.text
