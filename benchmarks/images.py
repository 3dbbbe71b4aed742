"""JPEGs to measure with: textured, as flat ones decode too fast. 500 x 375 pixels and about 110 KB, as ImageNet's."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 92
DISTINCT = 64  # different pictures; the files beyond are copies, each with pages of its own
CLASSES = 10


def textured(seed: int) -> bytes:
    """A JPEG of noise on all scales, about as much on each, in a colour."""
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


def write_images(root: Path, count: int) -> Path:
    """`root`/train and `root`/val with `count` and one tenth as many images; what is there already stays."""
    pictures = [root / "pictures" / f"{i}.jpg" for i in range(min(DISTINCT, count))]
    pictures[0].parent.mkdir(parents=True, exist_ok=True)
    for seed, picture in enumerate(pictures):
        if not picture.exists():
            picture.write_bytes(textured(seed))
    for split, number in (("train", count), ("val", max(CLASSES, count // 10))):
        for i in range(number):
            path = root / split / f"class-{i % CLASSES}" / f"{i:07d}.jpg"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pictures[i % len(pictures)], path)
    return root
