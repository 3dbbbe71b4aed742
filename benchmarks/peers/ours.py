"""The job in distil_tl: its command line, and the times in its run directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Job


def command(job: Job, run_dir: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """`python -m distil_tl.train` for the job. `extra` keys come last and take precedence."""
    keys = {
        "run_dir": run_dir,
        "seed": job.seed,
        "data.root": job.root,
        "data.image_size": job.image_size,
        "data.global_batch_size": job.batch,
        "data.hflip": str(job.hflip).lower(),
        "data.crop_mode": "squash" if job.squash else "weights",
        "model.name": f"timm/{job.model}",
        "model.weights": job.weights,
        "optim.weight_decay": job.weight_decay,
        "optim.warmup": job.warmup,
        "optim.clip_norm": job.clip_norm,
        "stages.full.layer_decay": 1.0,
        "stages.full.wise_ft": "false",
    }
    for stage in job.stages:
        keys |= {
            f"stages.{stage.name}.epochs": stage.epochs,
            f"stages.{stage.name}.lr": stage.lr,
            f"stages.{stage.name}.augment": stage.augment,
        }
    return [sys.executable, "-m", "distil_tl.train", *[f"{key}={value}" for key, value in keys.items()], *extra]


def search_keys(rates: int, decays: int) -> tuple[str, ...]:
    """Keys for a head search over a grid.

    Args:
        rates: number of learning rates, from 5e-4 to 5e-2.
        decays: number of weight decays: 0, and then from 1e-3 to 1.
    """
    lr = [round(5e-4 * 100 ** (i / (rates - 1)), 6) for i in range(rates)]
    decay = [0.0, *(round(1e-3 * 1000 ** (i / (decays - 2)), 6) for i in range(decays - 1))]
    lists = {"lr": lr, "weight_decay": decay}
    return tuple(f"stages.head.search.{key}=[{','.join(map(str, values))}]" for key, values in lists.items())


def read_run(run_dir: Path) -> dict[str, Any]:
    """The evaluations of a run in the format of the peers' events, and the seconds of each stage, features included."""
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
