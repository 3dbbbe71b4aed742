"""The task that training gives to the tracking process, and the exit statuses of that process."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distil_tl.tracking.config import WandbConfig
from distil_tl.utils.files import read_text, write_atomic

SENT, RETRY, GIVE_UP = 0, 1, 2  # exit status: all is sent, another attempt may succeed, none can succeed


@dataclass(frozen=True)
class Task:
    """One run to send to W&B.

    `pid` is the process of the training, whose use of the machine W&B records; None for `launch.sync`, which sends a
    run later.
    """

    run_dir: str
    mode: str
    project: str
    entity: str | None
    name: str
    group: str | None
    tags: list[str]
    artifact: bool
    mistakes: int
    config: dict[str, Any]
    pid: int | None = None


def wandb_task(run_dir: Path, settings: WandbConfig, config: dict[str, Any]) -> Task:
    """The task for a run. The first call makes the id of the W&B run, which never changes."""
    id_file = run_dir / "wandb-id"
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(4))
    given = asdict(settings)
    del given["finish_timeout_seconds"]
    name = settings.name or run_dir.resolve().name
    return Task(str(run_dir.resolve()), config=config, **{**given, "name": name})


def wandb_id(run_dir: Path) -> str:
    """The id of the W&B run, the same however often the run is resumed; empty if it is not tracked."""
    try:
        return read_text(run_dir / "wandb-id").strip()
    except (OSError, ValueError):
        return ""
