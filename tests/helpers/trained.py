"""Run directories with a checkpoint, without a training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from distil_tl.models.config import ModelConfig
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.transfer import build
from distil_tl.rundir.checkpoint import Checkpoints
from distil_tl.rundir.state import Position, RunState, StageRecord

CLASSES = ["circles", "noise", "stripes"]
NAME = "shufflenet_v2_x0_5"


def make_run(path: Path, data: Path, seed: int, classes: list[str] = CLASSES, name: str = NAME) -> Path:
    """A run of random weights."""
    path.mkdir()
    (path / "config.yaml").write_text(
        f"data: {{root: {data}, image_size: 32, workers: 0}}\nmodel: {{name: {name}, weights: none}}\n"
        "stages: {head: {unfreeze: head}}\nprecision: fp32\n"
    )
    model = build(ModelConfig(name, weights="none"), len(classes), image_size=32, seed=seed).module
    for _ in range(40):  # statistics for BatchNorm: else all images look alike
        model.train()(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    checkpoints = Checkpoints(path / "checkpoints")
    run = RunState(position=Position("head", 1, 0, 1), stages={"head": StageRecord(epochs=1)}).to_json()
    preprocess = Preprocess(crop_size=32, resize_size=32)
    state = {"classes": classes, "preprocess": asdict(preprocess), "run": run}
    checkpoints.save(1, weights=model.state_dict(), train_state={}, state=state, is_best=True)
    checkpoints.wait()
    return path
