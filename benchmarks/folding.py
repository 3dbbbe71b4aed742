"""Speed-up from folding BatchNorm into convolutions: images per second in training and evaluation, with and without.

    python -m benchmarks.folding [MODEL ...] [--image-size 128] [--batch 32] [--json FILE]

All layers train, with frozen BatchNorm statistics, in float32 and channels_last, on random images and weights. The two
variants alternate. Prints medians and ranges over several rounds, from wall-clock times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.fold_batchnorm import ConvNorm
from distil_tl.models.transfer import build
from distil_tl.training.config import StageConfig
from distil_tl.training.network import ImageNetwork, dummy_images, lay_out, set_layout, try_to_fold
from distil_tl.training.precision import Compute
from distil_tl.training.stage import apply_stage

MODELS = ["timm/tf_efficientnet_lite0", "mobilenet_v2", "resnet18", "resnet50"]
ROUNDS = 9
CLASSES = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--image-size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--batch", type=int, default=32, help="images (default: 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    sys.stdout.write(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.image_size} px, "
        f"batches of {options.batch}, load {os.getloadavg()[0]:.1f}\n"
    )
    rows = []
    for model in options.models:
        for row in measure(model, options.image_size, options.batch):
            rows.append(row)
            sys.stdout.write(
                f"{model:<28} {row['step']:<10} {'folded' if row['folded'] else 'not folded':<11} "
                f"{row['median']:6.0f}/s  ({row['low']:.0f}-{row['high']:.0f})\n"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def measure(name: str, image_size: int, batch: int, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each of training and evaluation, folded and not folded."""
    model = build(ModelConfig(name, weights="none"), CLASSES, image_size=image_size, seed=0)
    apply_stage(model, StageConfig(unfreeze="all"))
    cpu, compute = torch.device("cpu"), Compute(None, True)
    set_layout(model.module, compute)
    folded_model = try_to_fold(model, image_size, cpu, trains=True)
    network = ImageNetwork(model, compute, cpu, folded_model, image_size)
    lay_out(network)
    if network.folded is None:
        raise SystemExit(f"{name} has no BatchNorm to fold, or can't be traced")
    images, targets = dummy_images(batch, image_size, torch.device("cpu")), torch.arange(batch) % CLASSES
    rates: dict[tuple[str, bool], list[float]] = {}
    for turn in range(rounds + 1):  # the first one warms up
        for folded in (True, False) if turn % 2 else (False, True):
            for part in network.modules():
                if isinstance(part, ConvNorm):
                    part.folds = folded
            for step in ("training", "evaluation"):
                network.train(step == "training")
                began = time.perf_counter()
                with torch.set_grad_enabled(step == "training"):
                    loss = F.cross_entropy(network(images), targets)
                if step == "training":
                    loss.backward()  # type: ignore[no-untyped-call]
                if turn:
                    rates.setdefault((step, folded), []).append(batch / (time.perf_counter() - began))
    return [
        {"model": name, "step": step, "folded": folded, "median": statistics.median(measured),
         "low": min(measured), "high": max(measured)}
        for (step, folded), measured in sorted(rates.items(), reverse=True)
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
