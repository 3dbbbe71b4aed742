"""Send to Weights & Biases what it lacks: `python -m launch.sync DIR [--dry-run]`, of a run, a sweep, or several runs.

For what trained without network (`tracking.wandb.mode=offline`), and where tracking was cut off. From
metrics.jsonl, which is whole and holds each step once, however often a run was killed and went on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distil_tl.rundir.lock import FILE as ATTEMPT
from distil_tl.rundir.lock import is_alive, read_attempt
from distil_tl.tracking.config import WandbConfig
from distil_tl.tracking.tracker import Mirror, wandb_task
from distil_tl.tracking.wandb.process import Marks, Rows, Task, segments, wandb_id
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, UserError
from distil_tl.utils.log import setup_console
from launch.args import say
from launch.status import find_runs


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.sync", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=Path, help="a run directory, a sweep's, or any folder above some")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of one run; 600 if not given")
    known = parser.parse_args(args)
    return run_command("launch.sync", lambda: sync(known.dir, known.dry_run, known.timeout))


@dataclass(frozen=True)
class Todo:
    """What W&B lacks of a run. `ended` is how the run stands: completed, preempted, failed, or killed if unknown."""

    run_dir: Path
    steps: int
    segments: int
    ended: str
    done: bool

    @property
    def what(self) -> str:
        if self.done:
            return "all is sent"
        attempts = f", of {self.segments} offline attempts" if self.segments else ""
        return f"{self.steps} steps to send{attempts}" if self.steps else "its end to send"


def sync(folder: Path, dry_run: bool = False, timeout: float = 600) -> int:
    """Send what W&B lacks of all runs in `folder`, one after the other. The exit status: a fault when any failed.

    Raises:
        UserError: there is no run that W&B was to have, or W&B can't be used here at all.
    """
    setup_console(True)
    folder = folder.absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a run directory, or one above some")
    runs = [run_dir for run_dir in find_runs(folder) if wandb_id(run_dir)]
    if not runs:
        raise UserError(
            f"{folder} holds no run for Weights & Biases; one is with tracking.wandb.mode=offline or online"
        )
    if importlib.util.find_spec("wandb") is None:
        raise UserError("this needs wandb: pip install wandb")
    failed = 0
    for run_dir in runs:
        name = run_dir.relative_to(folder.parent)
        todo = look(run_dir)
        if todo.done or dry_run:
            say(f"{name}: {todo.what}")
            continue
        try:
            send(todo, timeout)
            say(f"{name}: sent")
        except UserError as error:
            failed += 1
            say(f"{name}: {error}")
    if failed:
        say(f"{failed} of {len(runs)} failed; the same command tries them again")
    return EXIT_FAULT if failed else 0


def look(run_dir: Path) -> Todo:
    """What W&B lacks of a run, as far as its own files know."""
    marks, rows = Marks.of(run_dir, "online"), Rows(run_dir / "metrics.jsonl")
    steps = [step for step, _ in rows.whole()] if rows.path.exists() else []
    try:
        ended = str(json.loads((run_dir / "summary.json").read_text())["status"])
    except (OSError, ValueError, KeyError):
        ended = "killed"
    if ended == "completed":
        steps.append(rows.last()[0])
    lacking = sum(step > marks.step for step in steps)
    done = marks.done if ended == "completed" else lacking == 0 and marks.safe == marks.step
    return Todo(run_dir, lacking, len(segments(run_dir)), ended, done)


def send(todo: Todo, timeout: float) -> None:
    """Send one run.

    Raises:
        UserError: saying why it could not be, or not to its end.
    """
    signed = read_attempt(todo.run_dir / ATTEMPT)
    settings, config = read_settings(todo.run_dir)
    in_use = signed is not None and "ended_at" not in signed and is_alive(signed)
    if in_use and settings.mode == "online":
        raise UserError("is training, and sends by itself")
    task: Task = replace(wandb_task(todo.run_dir, settings, config), mode="online")
    mirror = Mirror(task, quiet=True)
    if not mirror.end(todo.ended, timeout):
        raise UserError(mirror.reason or "could not be sent")


def read_settings(run_dir: Path) -> tuple[WandbConfig, dict[str, Any]]:
    """Of the run's config.yaml: the settings for W&B as they are meant, and the configuration as it may be shown."""
    try:
        source = OmegaConf.load(run_dir / "config.yaml")
        shown: Any = OmegaConf.to_container(source, resolve=False)
        given = OmegaConf.merge(OmegaConf.structured(WandbConfig), source.tracking.wandb)
        settings = OmegaConf.to_object(given)
    except Exception as error:  # the parsers' own errors share no public base
        raise UserError(f"can't read config.yaml: {' '.join(str(error).split())}") from None
    assert isinstance(settings, WandbConfig)
    return settings, shown


if __name__ == "__main__":
    raise SystemExit(main())
