"""Shared arrays."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from distil_tl.distributed.shared_memory import SharedArrays


def test_arrays_whose_creation_a_signal_ended_are_deleted_without_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    arrays = SharedArrays.__new__(SharedArrays)
    del arrays
    assert not errors
