"""distil_tl at the same job: its command line, and what its run directory says about when."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Job


def command(job: Job, run_dir: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """`python -m distil_tl.train` for the job; `extra` keys come last, and win."""
    keys = {
        "run_dir": run_dir,
        "seed": job.seed,
        "data.root": job.root,
        "data.image_size": job.image_size,
        "data.global_batch_size": job.batch,
        "data.hflip": str(job.hflip).lower(),
        "model.name": f"timm/{job.model}",
        "model.weights": job.weights,
        "optim.weight_decay": job.weight_decay,
        "optim.warmup": job.warmup,
        "optim.clip_norm": job.clip_norm,
        "stages.full.layer_decay": 1.0,
    }
    for stage in job.stages:
        keys |= {
            f"stages.{stage.name}.epochs": stage.epochs,
            f"stages.{stage.name}.lr": stage.lr,
            f"stages.{stage.name}.augment": stage.augment,
        }
    return [sys.executable, "-m", "distil_tl.train", *[f"{key}={value}" for key, value in keys.items()], *extra]


def read_run(run_dir: Path) -> dict[str, Any]:
    """Its evaluations as the peers' events, and the seconds of each stage, features included."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "events": [
            {"event": "epoch", **{key: line[key] for key in ("time", "stage", "epoch", "top1", "loss")}}
            for line in lines
            if line["split"] == "val"
        ],
        "stage_seconds": {name: record["seconds"] for name, record in summary["stages"].items()},
        "cached": any(record["cached"] for record in summary["stages"].values()),
    }
