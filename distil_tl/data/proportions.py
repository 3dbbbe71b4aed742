"""The proportions of the images, by which `data.crop_mode=auto` is chosen."""

from __future__ import annotations

import statistics

import numpy as np

from distil_tl.data.decode import ImageError, read_size
from distil_tl.data.index import Index

HEADERS = 256  # images looked at
SQUASHED_FROM = 1.15  # longer to shorter side


def typical_ratio(index: Index) -> float | None:
    """The median of longer to shorter side, of images from the whole split.

    Those without a readable header are left out; None if there are no others.
    """
    chosen = np.unique(np.linspace(0, len(index) - 1, min(HEADERS, len(index))).astype(int)).tolist()
    ratios = []
    for i in chosen:
        try:
            width, height = read_size(index.local_path(i))
        except (ImageError, OSError):
            continue
        ratios.append(max(width, height) / min(width, height))
    return statistics.median(ratios) if ratios else None


def crop_for(ratio: float | None) -> str:
    """The crop mode for images of a typical ratio of longer to shorter side. docs/recipes.md has the evidence."""
    return "squash" if ratio is not None and ratio > SQUASHED_FROM else "weights"
