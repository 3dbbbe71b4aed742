"""What helps with classes of unequal size: `data.balance` and `optim.loss` on long-tailed training images.

    python -m benchmarks.imbalance [FOLDER ...] [--ratio 100] [--seeds 3] [--json FILE]

From each folder (with train and val; without one the digits of the demo) images of train are linked so that the r-th of
C classes has `largest * ratio ** (-(r - 1) / (C - 1))` images, at least one. The seed decides on the ranks of the
classes and on the images. A head is trained on features of EfficientNet-Lite0 at 128 px for 20 epochs. The figures are
those of the last epoch on val, whose classes keep their sizes: nothing is chosen by them. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import markdown, version
from distil_tl.data.digits import digits_folder
from distil_tl.train import main as train

METHODS = {
    "nothing": [],
    "sampler": ["data.balance=sampler"],
    "weights": ["data.balance=weights"],
    "effective_number": ["data.balance=effective_number"],
    "logit_adjust": ["data.balance=logit_adjust"],
    "focal": ["optim.loss=focal"],
    "focal and weights": ["optim.loss=focal", "data.balance=weights"],
}
FIGURES = ("balanced_accuracy", "macro_f1", "top1")
ARGUMENTS = [
    "model.name=timm/tf_efficientnet_lite0", "data.image_size=128", "data.augment=none", "data.hflip=false",
    "data.global_batch_size=32", "stages.head.epochs=20", "stages.full.epochs=0", "precision=fp32",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: the digits of the demo")
    parser.add_argument("--ratio", type=int, default=100, help="largest to smallest class (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    results = []
    for root in options.folders or [digits_folder()]:
        with tempfile.TemporaryDirectory() as scratch:
            for seed in range(options.seeds):
                data = Path(scratch) / f"{root.name}-{seed}"
                counts = link_long_tail(root, data, options.ratio, seed)
                for method, arguments in METHODS.items():
                    figures = run(data, Path(scratch) / "run", seed, arguments)
                    results.append({"data": root.name, "seed": seed, "method": method, "counts": counts, **figures})
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm"))
    sys.stdout.write(f"ratio {options.ratio}, {options.seeds} seeds, {versions}\n\n{table(results)}\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def link_long_tail(root: Path, target: Path, ratio: int, seed: int) -> list[int]:
    """Link the images of a long tail of `root` into `target`. Returns the sizes of the classes, largest first."""
    rng = random.Random(seed)
    classes = sorted(path for path in (root / "train").iterdir() if path.is_dir())
    rng.shuffle(classes)
    images = [sorted(path for path in folder.iterdir() if path.is_file()) for folder in classes]
    largest = min(map(len, images))
    counts = []
    for rank, (folder, found) in enumerate(zip(classes, images, strict=True)):
        count = max(1, round(largest * ratio ** (-rank / max(1, len(classes) - 1))))
        (target / "train" / folder.name).mkdir(parents=True)
        for image in rng.sample(found, count):
            (target / "train" / folder.name / image.name).symlink_to(image.resolve())
        counts.append(count)
    (target / "val").symlink_to((root / "val").resolve())
    return counts


def run(data: Path, run_dir: Path, seed: int, arguments: list[str]) -> dict[str, Any]:
    """The figures of the last epoch of a run."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = train([*ARGUMENTS, *arguments, f"data.root={data}", f"run_dir={run_dir}", f"seed={seed}"])
    if status:
        raise SystemExit(f"training ended with status {status}")
    summary = json.loads((run_dir / "summary.json").read_text())
    shutil.rmtree(run_dir)
    return {key: summary["final"][key] for key in FIGURES}


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, of each method and folder."""
    rows = []
    for data in dict.fromkeys(row["data"] for row in results):
        for method in METHODS:
            found = [row for row in results if (row["data"], row["method"]) == (data, method)]
            cells = []
            for key in FIGURES:
                values = [row[key] for row in found]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            rows.append([data, f"{max(found[0]['counts'])}:{min(found[0]['counts'])}", method, *cells])
    return markdown(["images", "sizes", "method", "balanced accuracy", "macro-F1", "top-1"], rows)


if __name__ == "__main__":
    sys.exit(main())
