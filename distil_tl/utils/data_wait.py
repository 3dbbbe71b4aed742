"""The share of its time for which training waited for a batch: a GPU that waits for images is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTABLE = 0.2  # from this share on it is pointed out


def wait_share(values: Mapping[str, Any], seconds: str = "seconds") -> float | None:
    """`data_wait_seconds` divided by the seconds under another key; None where one of them is missing or unusable.

    Args:
        values: a line of metrics.jsonl, or a stage of summary.json (with `train_seconds`). Earlier runs lack the field.
    """
    waited, total = _number(values.get("data_wait_seconds")), _number(values.get(seconds))
    return min(1.0, max(0.0, waited / total)) if waited is not None and total else None


def is_notable(share: float | None) -> bool:
    return share is not None and share >= NOTABLE


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and abs(value) < 1e100 else None
