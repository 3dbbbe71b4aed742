"""The cost of an image between disk and network, on one core: decoding, and the transforms to the network's input.

    python -m benchmarks.input_cost [FOLDER] [--json FILE]

Takes 64 images of FOLDER, which contains train/CLASS/*. Without FOLDER it makes textured images, as flat ones decode
too fast. Prints images per second of CPU time: median and range over several rounds in alternating order. CPU time is
used instead of wall-clock time, as other processes may run. The files are in memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

from distil_tl.data import decode as decoding
from distil_tl.data import pillow
from distil_tl.data.decode import decode_bytes
from distil_tl.data.resize import smaller
from distil_tl.data.scan import scan
from distil_tl.data.transforms import train_transform
from distil_tl.models.preprocess import Preprocess

ROUNDS = 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="default: synthetic images")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = {
        "cpu": _cpu(), "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "pillow": PIL.__version__, "load": os.getloadavg()[0],
    }  # fmt: skip
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    rows = []
    for name, files in _sets(options.folder):
        rows += [{"images": name, **row} for row in measure(files, options.image_size)]
        for row in rows[-8:]:
            sys.stdout.write(
                f"{name:<34} {row['step']:<28} {row['median']:8.0f}/s  ({row['low']:.0f}-{row['high']:.0f})\n"
            )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0


def measure(files: list[bytes], image_size: int) -> list[dict[str, Any]]:
    """Images per second of CPU time, by step."""
    views = {augment: train_transform(Preprocess(), image_size, augment, hflip=True) for augment in
             ("none", "light", "strong")}  # fmt: skip
    whole = [decode_bytes(data) for data in files]
    decoded = {
        augment: [decode_bytes(data, min_side=view.min_side) for data in files] for augment, view in views.items()
    }
    steps: dict[str, Callable[[int], Any]] = {
        "decode by Pillow, whole": lambda i: _by_pillow(files[i]),
        "decode, whole": lambda i: decode_bytes(files[i]),
        "decode for none": lambda i: decode_bytes(files[i], min_side=views["none"].min_side),
        "decode for light": lambda i: decode_bytes(files[i], min_side=views["light"].min_side),
        "view none": lambda i: views["none"](decoded["none"][i]),
        "view light": lambda i: views["light"](decoded["light"][i]),
        "view strong": lambda i: views["strong"](decoded["strong"][i]),
        "resize to 256 (bicubic)": lambda i: smaller(whole[i], 256),
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            began = time.process_time()
            for i in range(len(files)):
                steps[name](i)
            rates[name].append(len(files) / (time.process_time() - began))
    return [{"step": name, "median": statistics.median(measured), "low": min(measured), "high": max(measured)}
            for name, measured in rates.items()]  # fmt: skip


def _by_pillow(data: bytes) -> Any:
    image = pillow.open_image(io.BytesIO(data))
    assert image is not None
    return decoding.to_tensor(image)


def _sets(folder: Path | None) -> list[tuple[str, list[bytes]]]:
    if folder is not None:
        index = scan(folder / "train")
        chosen = np.unique(np.linspace(0, len(index) - 1, 64).astype(int)).tolist()
        return [_named(folder.name, [index.path(i).read_bytes() for i in chosen])]
    return [
        _named("500 x 375", [textured(500, 375, seed, 88) for seed in range(32)]),
        _named("341 x 256", [textured(341, 256, seed, 95) for seed in range(32)]),
        _named("1600 x 1200", [textured(1600, 1200, seed, 85) for seed in range(6)]),
        _named("4000 x 3000", [textured(4000, 3000, seed, 80) for seed in range(2)]),
    ]


def _named(name: str, files: list[bytes]) -> tuple[str, list[bytes]]:
    return f"{name}, {sum(map(len, files)) / len(files) / 1000:.0f} KB", files


def textured(width: int, height: int, seed: int, quality: int) -> bytes:
    """A JPEG of noise on all scales, similar to a photograph."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for scale in (1, 2, 4, 8, 16, 32, 64, 128):
        size = (height // scale + 2, width // scale + 2)
        layer = rng.normal(size=(*size, 1)) + 0.4 * rng.normal(size=(*size, 3))
        for channel in range(3):
            part = Image.fromarray(layer[..., channel].astype(np.float32))
            pixels[..., channel] += np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
    pixels = (pixels - pixels.mean()) / pixels.std() * 55 + 128
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
