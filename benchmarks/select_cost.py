"""What `distil-tl select` costs, relative to its forward passes alone.

    python -m benchmarks.select_cost FOLDER [--grid linear|full] [key=value ...]

Two grids over EfficientNet-Lite0, -Lite1 and -Lite2, 128 and 224 px and three crops: `linear` has pooled features and
50 linear heads of 20 epochs, `full` four read-outs and all kinds of heads. Other arguments are passed to select. Each
is run once with empty caches, on one thread, and counted in seconds of CPU time: other processes may run. Start-up is
what comes before the first cell. The parts are of the rest:

- forward: the frozen networks, on all images, once for each backbone, size and crop
- images: reading, decoding and resizing them for that, and writing the features
- networks: building, loading weights, tracing and the check of the trace, and the measured speed
- heads: searching heads
- estimate: the cross-validation of the best, or its figure on test
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GRID = (
    "candidates=[timm/tf_efficientnet_lite0,timm/tf_efficientnet_lite1,timm/tf_efficientnet_lite2]",
    "sizes=[128,224]", "crops=[weights,center,squash]", "precision=fp32", "distributed.device=cpu", "data.workers=0",
)  # fmt: skip
GRIDS = {"linear": (), "full": ("readouts=[pooled,avg_max,last2,last3]", "heads=all")}


class Clock:
    """Seconds of CPU time by part. Of parts within each other the inner one counts, but for a `whole` one."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._whole = False
        self.first: float | None = None
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def count(self, owner: Any, name: str, part: str, *, whole: bool = False) -> None:
        """Count the calls of a function to a part, from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._whole:
                return function(*args, **kwargs)
            self._whole = whole
            began = time.process_time()
            self.first = began if self.first is None else self.first
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self._whole = False
                took = time.process_time() - began
                self.parts[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        self._restore.callback(setattr, owner, name, function)
        setattr(owner, name, counted)


def measure(args: list[str]) -> dict[str, float]:
    """Seconds by part, and `start-up`, of a selection in this process."""
    from distil_tl.cli import select as command
    from distil_tl.cli import selection
    from distil_tl.selection import cell_search
    from distil_tl.selection.heads import HeadSearches
    from distil_tl.training.feature_extraction import FeatureExtractor
    from distil_tl.training.memory import PartSize

    began = time.process_time()
    with Clock() as clock:
        clock.count(PartSize, "apply", "forward")
        clock.count(FeatureExtractor, "open", "images")
        clock.count(cell_search.CellSearch, "open_cell", "networks")
        clock.count(cell_search, "images_per_second", "networks")
        clock.count(HeadSearches, "result", "heads")
        clock.count(selection, "estimate", "estimate", whole=True)
        clock.count(selection._Selection, "run", "rest")
        status = command.main(args)
    if status:
        sys.exit(status)
    ended, first = time.process_time(), clock.first or began
    parts = dict(clock.parts)
    parts["rest"] += ended - first - sum(parts.values())
    return {**parts, "start-up": first - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--grid", choices=list(GRIDS), default="linear", help="default: linear")
    options, more = parser.parse_known_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["DISTIL_TL_CACHE"] = f"{place}/cache"
        args = [f"data.root={options.folder}", *GRID, *GRIDS[options.grid], *more, "--out", f"{place}/out"]
        parts = measure(args)
    total = sum(parts.values()) - parts["start-up"]
    for name, seconds in parts.items():
        sys.stdout.write(f"{name:<10} {seconds:8.1f} s\n")
    sys.stdout.write(f"without start-up {total:.1f} s: {total / parts['forward']:.2f} times the forward passes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
