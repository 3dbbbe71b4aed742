"""What a trace of torch.profiler says about a GPU: how busy it was, and whether copies overlapped with computing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

COMPUTING = ("kernel",)
COPYING = ("gpu_memcpy",)
Span = tuple[float, float]  # begin and end, in microseconds


def spans(events: Iterable[dict[str, Any]], kinds: Sequence[str], word: str = "") -> list[Span]:
    """Begin and end of the complete events of some categories whose name contains `word`, in order."""
    found = [
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds and word in event.get("name", "")
    ]
    return sorted(found)


def union(parts: Iterable[Span]) -> list[Span]:
    """The same time without overlaps. `parts` are in order."""
    merged: list[Span] = []
    for begin, end in parts:
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(parts: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in parts)


def common(one: Sequence[Span], two: Sequence[Span]) -> float:
    """Microseconds that two unions have in common."""
    total, j = 0.0, 0
    for begin, end in one:
        while j < len(two) and two[j][1] <= begin:
            j += 1
        k = j
        while k < len(two) and two[k][0] < end:
            total += min(end, two[k][1]) - max(begin, two[k][0])
            k += 1
    return total


def summarize(events: Sequence[dict[str, Any]], steps: int, kinds: Sequence[str] = COMPUTING) -> dict[str, Any]:
    """Figures of a trace of some steps.

    Returns:
        `busy`: the share of the time from the first kernel to the last in which one runs, None without kernels.
        `copies`: from the host to the device. `overlapped`: the share of their time in which a kernel runs.
        `ms_per_step`, and `longest`: the kernels with the most time, with their shares.
    """
    computing = union(spans(events, kinds))
    copies = union(spans(events, COPYING, "HtoD"))
    if not computing:
        return {"busy": None, "copies": len(copies), "overlapped": None, "ms_per_step": None, "longest": []}
    whole = computing[-1][1] - computing[0][0]
    by_name: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in kinds:
            by_name[str(event["name"])[:80]] += float(event["dur"])
    total = sum(by_name.values())
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    return {
        "busy": length(computing) / whole if whole else 1.0,
        "copies": len(spans(events, COPYING, "HtoD")),
        "overlapped": common(copies, computing) / length(copies) if length(copies) else None,
        "ms_per_step": whole / 1000 / steps,
        "longest": [{"name": name, "share": seconds / total} for name, seconds in longest] if total else [],
    }
