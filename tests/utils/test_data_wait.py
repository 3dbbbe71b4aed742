"""The share of time for which training waited, from lines of any age."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distil_tl.utils.data_wait import is_notable, wait_share


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ({"data_wait_seconds": 1.0, "seconds": 4.0}, 0.25),
        ({"data_wait_seconds": 0, "seconds": 4}, 0.0),
        ({"data_wait_seconds": 4.1, "seconds": 4.0}, 1.0),  # the clocks of two ranks
        ({"seconds": 4.0}, None),  # of earlier code
        ({"data_wait_seconds": 1.0}, None),
        ({"data_wait_seconds": 1.0, "seconds": 0.0}, None),
        ({"data_wait_seconds": None, "seconds": 4.0}, None),
        ({"data_wait_seconds": "1", "seconds": 4.0}, None),
        ({"data_wait_seconds": math.nan, "seconds": 4.0}, None),
        ({"data_wait_seconds": 10**400, "seconds": 4.0}, None),
    ],
)
def test_a_share(values: dict[str, Any], share: float | None) -> None:
    assert wait_share(values) == share


def test_what_is_notable() -> None:
    assert [is_notable(share) for share in (None, 0.0, 0.1, 0.2, 1.0)] == [False, False, False, True, True]
    assert wait_share({"data_wait_seconds": 1.0, "train_seconds": 2.0}, "train_seconds") == 0.5
