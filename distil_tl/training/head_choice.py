"""Which head of a search is chosen, by its figures on val."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distil_tl.training.config import rank_by

Head = dict[str, Any]  # its settings and its figures on val; None where they are not finite


def choose_head(heads: Sequence[Head], metric: str, prefer: str, images: int) -> dict[str, Any] | None:
    """The chosen head, with how it was chosen if that was not by `metric` alone; None if no head has a finite loss.

    `best` is the best by `metric`, then by loss, then the first. `regularized` is, of all heads within one standard
    error of that, the one with the highest weight decay, then the lowest learning rate. The error is that of a share of
    `images` images: what the metric of one head would vary with other images of val.
    """
    finite = [head for head in heads if head["loss"] is not None]
    if not finite:
        return None
    best = min(finite, key=lambda head: rank_by(metric, head))
    if prefer == "best":
        return dict(best)
    error = math.sqrt(best[metric] * (1 - best[metric]) / max(1, images))
    near = [head for head in finite if head[metric] >= best[metric] - error]
    chosen = min(near, key=lambda head: (-head["weight_decay"], head["lr"]))
    return {**chosen, "prefer": prefer, "standard_error": error, "near": len(near), "best": best}


def how_chosen(result: dict[str, Any], metric: str) -> str:
    """The choice in words."""
    name = "top-1" if metric == "top1" else metric
    chosen = f"lr {result['lr']:g} with weight decay {result['weight_decay']:g}, {name} {result[metric]:.4f} on val"
    if "near" not in result:
        return f"best is {chosen}"
    best, error = result["best"], result["standard_error"]
    return (
        f"{result['near']} are within one standard error ({error:.4f}) of the best, lr {best['lr']:g} with weight "
        f"decay {best['weight_decay']:g}, {name} {best[metric]:.4f}; the most regularized is {chosen}"
    )
