"""Small images of three classes that a network can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("circles", "noise", "stripes")


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """A small picture of a class that a network can learn: 40x36 pixels, RGB."""
    height, width = 36, 40
    y, x = np.mgrid[:height, :width]
    if kind == "stripes":
        grey = 127 + 120 * np.sin(x * rng.uniform(0.6, 1.2) + rng.uniform(0, 6))
    elif kind == "circles":
        grey = 127 + 120 * np.cos(np.hypot(x - rng.uniform(10, 30), y - rng.uniform(10, 26)) * rng.uniform(0.6, 1.0))
    else:
        grey = rng.uniform(0, 255, (height, width))
    colour = rng.uniform(0.5, 1.0, 3)
    return Image.fromarray((grey[..., None] * colour).clip(0, 255).astype(np.uint8))


def make_folder(root: Path, splits: dict[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """An ImageFolder with this number of images per split, divided among the classes in turn."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for i in range(count):
            kind = classes[i % len(classes)]
            folder = root / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            draw(kind, rng).save(folder / f"{i:04d}.png")
    return root
