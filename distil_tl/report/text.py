"""Numbers as people read them. Every function takes None for a value that is not there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

NOTHING = "\u2014"
Show = Callable[[float], str]
SPACE = "\u202f"  # narrow and unbreakable: between a number and its unit


def number(value: object) -> float | None:
    """`value` as a finite float, or None for anything else: files of failed runs hold null and NaN.

    What is finite but beyond any measure counts as neither: axes could not be computed around it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    if not abs(result) < 1e100:
        return None
    return result if abs(result) > 1e-100 else 0.0


def percent(value: float | None, digits: int = 1) -> str:
    """0.934 as `93.4 %`; never rounded up to 100 when it is less."""
    if value is None:
        return NOTHING
    shown = value * 100
    if value < 1 and round(shown, digits) >= 100:
        shown = 100 - 10**-digits
    return f"{shown:.{digits}f}{SPACE}%"


def points(value: float | None) -> str:
    """A difference of two fractions, in percentage points with its sign."""
    return NOTHING if value is None else f"{value * 100:+.1f}".replace("-", "\u2212")


def decimal(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """Whole numbers with separators."""
    return NOTHING if value is None else f"{round(value):,}"


def rate(value: float | None) -> str:
    """Images a second: digits only where they matter."""
    if value is None:
        return NOTHING
    return count(value) if value >= 100 else f"{value:.1f}"


def short(value: float | None) -> str:
    """Large counts: `25.6 M`."""
    if value is None:
        return NOTHING
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{SPACE}{unit}"
    return f"{value:.4g}"


def tick(value: float) -> str:
    """An axis label for a plain number, short: `0.05`, `2e-5`, `25 k`."""
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return short(value)
    if abs(value) >= 1e-3:
        return f"{value:.6g}"
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units."""
    if seconds is None:
        return NOTHING
    if 0 <= seconds < 10:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size}{SPACE}{unit}" + (f" {rest}{SPACE}{part_unit}" if rest else "")
    return f"{whole}{SPACE}s"


def moment(value: object) -> str:
    """A unix time in UTC; a text stays as it is."""
    seconds = number(value)
    if seconds is None:
        return value if isinstance(value, str) else NOTHING
    try:
        return f"{datetime.fromtimestamp(seconds, tz=timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return NOTHING
