"""Synthetic JPEGs of the size of ImageNet's: 500 x 375 pixels, about 110 KB. Textured: flat images decode too fast."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 92
DISTINCT = 64  # different images; the other files are copies of these, each with its own pages in the page cache
CLASSES = 10


def textured(seed: int) -> bytes:
    """A JPEG of noise on all scales, equally strong on each, in one colour."""
    rng = np.random.default_rng(seed)
    grey = np.zeros((HEIGHT, WIDTH))
    for scale, strength in ((1, 29.0), (2, 12.0), (4, 14.0), (16, 20.0), (64, 40.0)):
        small = rng.normal(0, strength, (HEIGHT // scale + 2, WIDTH // scale + 2)).astype(np.float32)
        grey += np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    colour = rng.uniform(0.6, 1.0, 3)
    pixels = ((grey + 128)[..., None] * colour).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def write_images(root: Path, count: int, *, link: bool = False) -> Path:
    """Write `count` images to `root`/train and a tenth as many to `root`/val. Existing files are kept.

    Args:
        link: with hard links instead of copies, which takes less time and space.
    """
    originals = [root / "pictures" / f"{i}.jpg" for i in range(min(DISTINCT, count))]
    originals[0].parent.mkdir(parents=True, exist_ok=True)
    for seed, original in enumerate(originals):
        if not original.exists():
            original.write_bytes(textured(seed))
    for split, number in (("train", count), ("val", max(CLASSES, count // 10))):
        for i in range(number):
            path = root / split / f"class-{i % CLASSES}" / f"{i:07d}.jpg"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                (os.link if link else shutil.copyfile)(originals[i % len(originals)], path)
    return root
