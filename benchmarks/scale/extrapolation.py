"""Laws of the number of ranks, fitted to measurements of a few ranks, with the error that they have at more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TERMS: dict[str, Callable[[float], float]] = {
    "1": lambda n: 1.0,
    "log n": math.log2,
    "n": lambda n: n,
    "n²": lambda n: n**2,
    "n³": lambda n: n**3,
}


@dataclass(frozen=True)
class Law:
    """A sum of at most two terms with positive factors."""

    factors: dict[str, float]

    def __call__(self, ranks: float) -> float:
        return sum(factor * TERMS[name](ranks) for name, factor in self.factors.items())


def fit(ranks: Sequence[int], values: Sequence[float]) -> Law:
    """The law with the smallest relative errors. Of two that are about equal, the one with the fewer terms."""
    scale = max(map(abs, values), default=0.0)
    if scale == 0.0:
        return Law({})
    weights = 1.0 / np.maximum(np.abs(np.asarray(values, float)), 1e-3 * scale)
    best, least = Law({}), math.inf
    for count in (1, 2):
        for names in itertools.combinations(TERMS, count):
            columns = np.array([[TERMS[name](n) for name in names] for n in ranks])
            factors, *_ = np.linalg.lstsq(columns * weights[:, None], np.asarray(values, float) * weights, rcond=None)
            errors = (columns @ factors - values) * weights
            total = float(errors @ errors)
            if (factors >= 0).all() and total < 0.7 * least:
                best, least = Law(dict(zip(names, map(float, factors), strict=True))), total
    return best


def error(law: Law, ranks: int, measured: float) -> float:
    """The relative error of the law where it was not fitted; 0 if nothing was measured there either."""
    return 0.0 if measured == 0 else law(ranks) / measured - 1.0
