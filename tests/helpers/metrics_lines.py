"""Lines of metrics.jsonl and trackers, for the tests of tracking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distil_tl.tracking.config import TrackingConfig, WandbConfig
from distil_tl.tracking.tracker import Tracker


def line(step: int, **more: Any) -> dict[str, Any]:
    fixed = {"epoch": 1, "stage": "head", "split": "train", "window": "interval", "loss": 0.5}
    return {"step": step, **fixed, **more}


def tracker(run_dir: Path, mode: str = "disabled", *, after_step: int = 0, **more: Any) -> Tracker:
    settings = TrackingConfig(wandb=WandbConfig(mode=mode, **more))
    record = Tracker(run_dir, settings, {"seed": 1})
    record.open(after_step=after_step)
    return record


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[int]:
    return [entry["step"] for entry in lines(run_dir)]
