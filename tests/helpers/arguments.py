"""Arguments of small runs."""

from __future__ import annotations

from pathlib import Path

# Few layers, with BatchNorm: a run takes two thirds of the time that it takes with torchvision's smallest network.
SMALLEST = "timm/test_resnet"
WITHOUT_TIMM = "model.name=shufflenet_v2_x0_5"  # for commands: a new process takes a second to import timm


def small_args(folder: Path) -> list[str]:
    """Arguments of a two-stage run that takes seconds: 6 steps of 8 images an epoch."""
    return [
        f"data.root={folder}",
        "data.image_size=32",
        "data.global_batch_size=8",
        "data.workers=0",
        f"model.name={SMALLEST}",
        "model.weights=none",
        "stages.head.epochs=1",
        "stages.head.augment=null",  # as data.augment; by default it trains on features
        "stages.full.epochs=2",
        "stages.head.lr=0.01",
        "stages.full.lr=0.001",
        "stages.full.unfreeze=2",
        "stages.full.wise_ft=false",  # its evaluations take longer than the training
        "optim.name=sgd",
        "tracking.log_every=1",
        "distributed.timeout_seconds=60",
        "distributed.device=cpu",
    ]


def head_args(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """Three epochs of the head without augmentation, then one of everything."""
    general = [arg for arg in small_args(folder) if not arg.startswith("stages.")]
    stages = ["stages.head.epochs=3", "stages.head.lr=0.01", "stages.full.epochs=1", "stages.full.lr=0.001"]
    stages.append("stages.full.wise_ft=false")
    return [*general, *stages, "data.augment=none", f"run_dir={run_dir}", *more]
