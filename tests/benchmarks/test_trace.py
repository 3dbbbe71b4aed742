"""Figures of a trace of torch.profiler."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.trace import common, summarize, union


def event(name: str, begin: float, seconds: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": seconds}


def test_time_without_overlaps() -> None:
    assert union([(0, 2), (1, 3), (5, 6)]) == [(0, 3), (5, 6)]
    assert common([(0, 3), (5, 6)], [(2, 5.5), (5.75, 9)]) == 1.75
    assert common([(0, 9)], [(1, 2), (3, 4)]) == 2


def test_busy_share_and_overlapped_copies() -> None:
    events = [
        event("conv", 0, 40), event("conv", 20, 20), event("add", 60, 40),  # 40 to 60: nothing
        event("Memcpy HtoD (Pinned -> Device)", 30, 20, "gpu_memcpy"),  # half of it during a kernel
        event("Memcpy DtoH (Device -> Pageable)", 200, 1, "gpu_memcpy"), event("aten::add", 0, 500, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    found = summarize(events, steps=2)
    assert found["busy"] == pytest.approx(0.8)
    assert found["copies"] == 1
    assert found["overlapped"] == pytest.approx(0.5)
    assert found["ms_per_step"] == pytest.approx(0.05)
    assert found["longest"][0] == {"name": "conv", "share": 0.6}


def test_a_trace_without_kernels() -> None:
    assert summarize([event("aten::add", 0, 5, "cpu_op")], steps=1)["busy"] is None
