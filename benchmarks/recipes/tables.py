"""Means with intervals over the seeds, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.measure import markdown

# Half the width of a 95 % interval of a mean, in standard errors, by the degrees of freedom (Student's t).
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def tables(results: Sequence[dict[str, Any]], figure: str) -> str:
    """For val and test: means with 95 % intervals over the seeds, and differences from the first recipe, by seed."""
    columns = list(dict.fromkeys((row["task"], row["form"]) for row in results))
    recipes = list(dict.fromkeys(row["recipe"] for row in results))
    header = [f"{task}, {form}" if form != "full" else task for task, form in columns]

    def values(recipe: str, column: tuple[str, str], split: str) -> dict[int, float]:
        chosen = [row for row in results if (row["task"], row["form"]) == column and row["recipe"] == recipe]
        return {row["seed"]: row["seconds"] if split == "seconds" else row[split][figure] for row in chosen}

    text = ""
    for split in ("val", "test"):
        rows = [[name, *(interval(values(name, column, split).values()) for column in columns)] for name in recipes]
        text += f"{figure} on {split}\n\n{markdown([split, *header], rows)}\n"
        rows = []
        for name in recipes[1:]:
            cells = []
            for column in columns:
                own, first = values(name, column, split), values(recipes[0], column, split)
                cells.append(interval((own[seed] - first[seed] for seed in own), sign="+"))
            rows.append([name, *cells])
        if rows:
            text += f"{figure} on {split}, less that of {recipes[0]}\n\n{markdown([split, *header], rows)}\n"
    rows = [[name, *(f"{statistics.mean(values(name, column, 'seconds').values()):.0f}" for column in columns)]
            for name in recipes]  # fmt: skip
    return f"{text}seconds of a run, with the computation of its features\n\n{markdown(['', *header], rows)}"


def interval(values: Iterable[float], sign: str = "") -> str:
    """The mean and half the width of its 95 % interval."""
    numbers = list(values)
    mean = f"{statistics.mean(numbers):{sign}.3f}"
    if len(numbers) < 2:
        return mean
    width = T95.get(len(numbers) - 1, 1.96) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{mean} ± {width:.3f}"
