"""Settings that may be `auto`: chosen when the images are known."""

from __future__ import annotations

import re
from typing import Any

AUTO = "auto"


def whole_number(value: Any) -> Any:
    """`value`, or the whole number that a text is, such as that of an environment variable."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value) else value
