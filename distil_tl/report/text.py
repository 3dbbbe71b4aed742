"""Formatting of numbers for the report. Every function accepts None for a missing value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

MISSING = "\u2014"
Format = Callable[[float], str]
METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
SPACE = "\u202f"  # narrow no-break space, between a number and its unit


def metric_name(metric: str) -> str:
    """The metric as it is written in sentences."""
    return METRIC_NAMES.get(metric, metric)


def capitalized(words: str) -> str:
    """With a capital at the beginning; the rest stays, unlike with `str.capitalize`."""
    return words[:1].upper() + words[1:]


def number(value: object) -> float | None:
    """`value` as a finite float, or None for anything else: files of failed runs contain null and NaN.

    Absolute values above 1e100 also give None, and values below 1e-100 give 0, so that axes can be computed.
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
        return MISSING
    shown = value * 100
    if value < 1 and round(shown, digits) >= 100:
        shown = 100 - 10**-digits
    return f"{shown:.{digits}f}{SPACE}%"


def percentage_points(value: float | None) -> str:
    """A difference of two fractions, in percentage points with a sign."""
    return MISSING if value is None else f"{value * 100:+.1f}".replace("-", "\u2212")


def decimal(value: float | None, digits: int = 3) -> str:
    """A fixed number of decimal places."""
    return MISSING if value is None else f"{value:.{digits}f}"


def figure(metric: str, value: float | None) -> str:
    """A loss as a number, other metrics in percent."""
    return decimal(value) if metric == "loss" else percent(value)


def chosen_by_it(candidates: int, metric: str) -> str:
    """What is to be said of the figure of the best one of several candidates."""
    one = f"the best of {candidates} candidates" if candidates > 1 else "the head"
    return f"{one} is chosen by this figure, so it is rather too {'low' if metric == 'loss' else 'high'}"


SETTINGS = {"lr": "lr", "weight_decay": "decay", "penalty": "penalty", "shrinkage": "shrinkage", "k": "k"}


def settings_of(head: Mapping[str, Any]) -> str:
    """The settings of a head, as in "lr 0.01 decay 0.1"; empty if it has none."""
    return " ".join(f"{name} {head[key]:g}" for key, name in SETTINGS.items() if head.get(key) is not None)


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return MISSING if value is None else f"{round(value):,}"


def rate(value: float | None) -> str:
    """Images per second: a decimal place only below 100."""
    if value is None:
        return MISSING
    return count(value) if value >= 100 else f"{value:.1f}"


def compact(value: float | None) -> str:
    """A large count: `25.6 M`."""
    if value is None:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{SPACE}{unit}"
    return f"{value:.4g}"


def tick(value: float) -> str:
    """A short axis label: `0.05`, `2e-5`, `25 k`."""
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return compact(value)
    if abs(value) >= 1e-3:
        return f"{value:.6g}"
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def duration(seconds: float | None) -> str:
    """Seconds, in the two largest units: `2 h 5 min`."""
    if seconds is None:
        return MISSING
    if 0 <= seconds < 10:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size}{SPACE}{unit}" + (f" {rest}{SPACE}{part_unit}" if rest else "")
    return f"{whole}{SPACE}s"


def timestamp(value: object) -> str:
    """A Unix time as a date and time in UTC; text is returned unchanged."""
    seconds = number(value)
    if seconds is None:
        return value if isinstance(value, str) else MISSING
    try:
        return f"{datetime.fromtimestamp(seconds, tz=timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return MISSING
