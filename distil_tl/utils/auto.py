"""Settings that may be `auto`: chosen when the images are known."""

from __future__ import annotations

import math
import re
from typing import Any

AUTO = "auto"


def whole_number(value: Any) -> Any:
    """`value`, or the whole number that a text is, such as that of an environment variable."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value) else value


def real_number(value: Any) -> Any:
    """`value` as a float, also from a whole number or a text; unchanged if it is none."""
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
    except OverflowError:  # a whole number of hundreds of digits; as a text it is infinite, too
        return math.inf if value > 0 else -math.inf
