"""What is written while a run goes on: metrics.jsonl always, Weights & Biases when asked."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from distil_tl.files import json_safe, write_atomic
from distil_tl.log import logger

WANDB_MODES = ("disabled", "offline", "online")


@dataclass
class WandbConfig:
    mode: str = "disabled"  # disabled | offline | online
    project: str = "distil_tl"  # where the runs are collected
    entity: str | None = None  # the user or team; null: W&B's own default
    name: str | None = None  # null: the run directory's
    group: str | None = None  # runs to be shown together, such as a sweep's
    tags: list[str] = field(default_factory=list)  # as in [baseline,224px]


@dataclass
class TrackingConfig:
    log_every: int = 20  # optimizer steps between lines of training metrics
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def problems(self) -> list[str]:
        found = []
        if self.log_every < 1:
            found.append("tracking.log_every must be at least 1")
        if self.wandb.mode not in WANDB_MODES:
            found.append(f"tracking.wandb.mode is {self.wandb.mode!r}; choose one of {', '.join(WANDB_MODES)}")
        return found


class Tracker:
    """Rank 0's record of a run.

    Args:
        run_dir: holds metrics.jsonl.
        after_step: the step that the run goes on from; lines of later steps, which a killed attempt wrote, go.
        within_epoch: that step's epoch is not evaluated yet, so that what a killed attempt wrote of it goes too.
        config: as it may be shown, without secrets.
        check: may object to a line by raising.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrackingConfig,
        config: dict[str, Any],
        *,
        after_step: int = 0,
        within_epoch: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        path = run_dir / "metrics.jsonl"
        if path.exists():
            write_atomic(path, "".join(_lines_up_to(path, after_step, within_epoch)))
        self._file = path.open("a", buffering=1)
        self._wandb = _start_wandb(run_dir, settings.wandb, config)

    def log(self, line: dict[str, Any]) -> None:
        """Write one line; `step`, `stage` and `split` are in it."""
        self._check()
        line = {**line, "time": time.time()}
        self._file.write(json.dumps(json_safe(line), allow_nan=False) + "\n")
        if self._wandb is not None:
            self._to_wandb(line)

    def _to_wandb(self, line: dict[str, Any]) -> None:
        series = "train_epoch" if line["split"] == "train" and line.get("window") == "epoch" else line["split"]
        numbers = {
            f"{series}/{key}": value
            for key, value in line.items()
            if isinstance(value, (int, float)) and key not in ("step", "epoch", "time")
        }
        try:
            self._wandb.log({**numbers, "epoch": line["epoch"], "stage": line["stage"]}, step=line["step"])
        except Exception as error:  # whatever W&B does, training goes on
            logger.warning("Weights & Biases stopped (%s); metrics.jsonl has everything", error)
            self._wandb = None

    def close(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        self._file.close()
        if self._wandb is None:
            return
        try:
            for split in ("best", "final", "test"):
                for key, value in (summary.get(split) or {}).items():
                    self._wandb.summary[f"{split}/{key}"] = value
            self._wandb.finish(exit_code=exit_code)
        except Exception as error:
            logger.warning("Weights & Biases did not finish (%s); metrics.jsonl has everything", error)


def _lines_up_to(path: Path, step: int, within_epoch: bool) -> list[str]:
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
            too_late = within_epoch and found["step"] == step and found["window"] == "epoch"
            if found["step"] <= step and not too_late:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off, or a power cut left in pieces
            continue
    return kept


def _start_wandb(run_dir: Path, settings: WandbConfig, config: dict[str, Any]) -> Any:
    if settings.mode == "disabled":
        return None
    try:
        import wandb

        id_file = run_dir / "wandb-id"
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4))
        return wandb.init(
            id=id_file.read_text(),
            resume="allow" if settings.mode == "online" else None,
            mode=cast(Any, settings.mode),
            dir=run_dir,
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run_dir.resolve().name,
            group=settings.group,
            tags=settings.tags,
            config=config,
        )
    except Exception as error:  # not installed, no key, no network: a run is worth more than its dashboard
        logger.warning("Weights & Biases is off for this run: %s", error)
        return None
