"""The plain training loop as a recipe of benchmarks.recipes: the same network, images, batch and augmentation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import plain
from benchmarks.peers.__main__ import save_initial_state
from benchmarks.peers.job import Events, Job, Speed, Stage, read_events
from distil_tl.data.scan import scan
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build
from distil_tl.training.records import near
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_json

# What a plain recipe can change, and its defaults. `crop` is that of evaluation: weights, or squash.
KEYS = {
    "head_epochs": "3", "full_epochs": "5", "head_lr": "1e-2", "full_lr": "3e-4", "batch": "32", "crop": "weights",
    "augment": "light",
}  # fmt: skip
SPEED = Speed(workers=0, fused=True, frozen_statistics=True)


def run_plain(run_dir: Path, given: Mapping[str, str], root: Path, seed: int, *, hflip: bool, size: int) -> None:
    """Train with the plain loop. Writes summary.json with the fields of a run that benchmarks.recipes reads.

    Raises:
        UserError: there is no such key.
    """
    if unknown := set(given) - set(KEYS):
        raise UserError(f"the plain loop has no {', '.join(sorted(unknown))}; it has {', '.join(KEYS)}")
    began = time.monotonic()
    torch.manual_seed(seed)
    classes = scan(root / "train").classes
    job = make_job(run_dir, {**KEYS, **given}, root, len(classes), seed, hflip=hflip, size=size)
    events = run_dir / "events.jsonl"
    events.unlink(missing_ok=True)
    plain.run(job, Events(events))
    seconds = time.monotonic() - began
    write_json(run_dir / "summary.json", summary(read_events(events), seconds, len(scan(root / "val", classes))))


def make_job(
    run_dir: Path, values: Mapping[str, str], root: Path, classes: int, seed: int, *, hflip: bool, size: int
) -> Job:
    model = build(ModelConfig(name="timm/tf_efficientnet_lite0"), classes, image_size=size, seed=seed)
    seen = model.preprocess
    return Job(
        root=str(root), model="tf_efficientnet_lite0", head=model.heads[0], classes=classes, image_size=size,
        weights=str(save_initial_state(model, run_dir / "initial.safetensors")), resize=seen.resize_for(size),
        mean=seen.mean, std=seen.std, interpolation=seen.interpolation, hflip=hflip, batch=int(values["batch"]),
        stages=(
            Stage("head", int(values["head_epochs"]), float(values["head_lr"]), values["augment"]),
            Stage("full", int(values["full_epochs"]), float(values["full_lr"]), values["augment"]),
        ),
        weight_decay=0.01, warmup=0.1, clip_norm=1.0, seed=seed, threads=torch.get_num_threads(), device="cpu",
        speed=SPEED, squash=values["crop"] == "squash", test=True,
    )  # fmt: skip


def summary(events: list[dict[str, Any]], seconds: float, n: int) -> dict[str, Any]:
    """The epoch that is kept, with its figures on val and test. The seconds are without the evaluations of test.

    It is the best one on `n` images of val, or the last one if that is within its interval, as in distil_tl.
    """
    rows = []
    for val, test in itertools.pairwise(events):
        if val["event"] == "epoch" and test["event"] == "test":
            rows.append(
                {split: {"top1": row["top1"], "loss": row["loss"]} for split, row in (("best", val), ("test", test))}
            )
            seconds -= test["time"] - val["time"]
    best = min(rows, key=lambda row: (-row["best"]["top1"], row["best"]["loss"]))
    kept = rows[-1] if near("top1", rows[-1]["best"], {**best["best"], "n": n}) else best
    return {"status": "completed", **kept, "total_seconds": seconds}
