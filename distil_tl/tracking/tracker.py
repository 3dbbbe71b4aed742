"""Metrics of a run while it trains: metrics.jsonl, and Weights & Biases if configured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from distil_tl.tracking.config import TrackingConfig
from distil_tl.tracking.wandb.client import WandbClient
from distil_tl.tracking.wandb.task import wandb_task
from distil_tl.utils.files import json_safe, open_regular, write_atomic, writing

STOP_SECONDS = 10.0  # for W&B when training stops early: the launcher waits for this process


class Tracker:
    """Rank 0's record of a run.

    Args:
        run_dir: holds metrics.jsonl.
        config: the configuration without secrets, as W&B shows it.
        check: called before each line is written; it may raise.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrackingConfig,
        config: dict[str, Any],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "metrics.jsonl"
        self._settings = settings
        self._config = config
        self._check = check
        self._file: TextIO | None = None
        self._wandb: WandbClient | None = None

    @property
    def closed(self) -> bool:
        """Whether `log` can't be called: not open yet, or closed."""
        return self._file is None or self._file.closed

    def open(self, *, after_step: int = 0, within_epoch: bool = False) -> None:
        """Open metrics.jsonl, without the lines that a killed process wrote after its last checkpoint. Start W&B.

        Args:
            after_step: the step that the run resumes from; lines of later steps are removed.
            within_epoch: the epoch of that step is not evaluated yet, so its epoch lines are removed too.

        Raises:
            WriteError: the file can't be written.
        """
        with writing(self._path):
            if self._path.exists():
                write_atomic(self._path, "".join(_lines_up_to(self._path, after_step, within_epoch)))
            self._file = self._path.open("a", buffering=1, encoding="utf-8")
        if self._settings.wandb.mode != "disabled":
            with writing(self._run_dir / "wandb-id"):
                task = wandb_task(self._run_dir, self._settings.wandb, self._config)
            self._wandb = WandbClient(replace(task, pid=os.getpid()))

    def log(self, line: dict[str, Any]) -> None:
        """Write one line, with `step`, `epoch`, `stage`, `split` and `window` in it.

        Raises:
            WriteError: the line can't be written.
        """
        assert self._file is not None
        self._check()
        line = {**line, "time": time.time()}
        with writing(self._path):
            self._file.write(json.dumps(json_safe(line), allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.poll()

    def close(self, status: str) -> None:
        """Close metrics.jsonl, and wait for W&B. `status` is completed, preempted, failed or superseded."""
        if self._file is not None:
            with suppress(OSError):  # a line that could not be written; `log` has raised for it
                self._file.close()
        wandb, self._wandb = self._wandb, None
        if wandb is not None:
            timeout = self._settings.wandb.finish_timeout_seconds
            wandb.end(status, timeout if status == "completed" else min(timeout, STOP_SECONDS))


def _lines_up_to(path: Path, step: int, within_epoch: bool) -> list[str]:
    """The lines of metrics.jsonl to keep when training resumes from `step`."""
    kept = []
    with open_regular(path) as file:
        content = file.read().decode("utf-8", errors="replace")
    for text in content.splitlines():
        try:
            line = json.loads(text)
            repeated = within_epoch and line["step"] == step and line["window"] == "epoch"
            if line["step"] <= step and not repeated:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):  # an incomplete or damaged line, after a kill or a power failure
            continue
    return kept
