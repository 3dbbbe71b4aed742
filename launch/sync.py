"""Send unsent metrics to Weights & Biases: `python -m launch.sync DIR [--dry-run]`, for a run, a sweep or several.

For runs that trained without network (`tracking.wandb.mode=offline`), or whose connection broke. The source is
metrics.jsonl, which is complete and has each step once, even if the run was killed and resumed.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distil_tl.rundir.lock import FILE as ATTEMPT_FILE
from distil_tl.rundir.lock import is_alive, read_attempt
from distil_tl.tracking.config import WandbConfig
from distil_tl.tracking.wandb.client import WandbClient
from distil_tl.tracking.wandb.rows import Rows
from distil_tl.tracking.wandb.state import Marks, segments
from distil_tl.tracking.wandb.task import Task, wandb_id, wandb_task
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, UserError, listed
from distil_tl.utils.files import write_atomic
from distil_tl.utils.home import path_argument
from distil_tl.utils.import_path import is_installed
from distil_tl.utils.log import setup_console
from launch.args import print_line, seconds
from launch.records import read_json
from launch.status import find_runs


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.sync", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "dir", type=path_argument, help="a run directory, the folder of a sweep, or any folder with runs in it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    parser.add_argument(
        "--timeout", type=seconds, default=600, metavar="SECONDS", help="time limit for each run (default: 600)"
    )
    options = parser.parse_args(args)
    return run_command("launch.sync", lambda: sync(options.dir, options.dry_run, options.timeout))


@dataclass(frozen=True)
class Unsent:
    """What W&B does not have of a run yet.

    Attributes:
        steps: number of steps.
        segments: number of offline attempts.
        status: of the run: completed, preempted, failed, or killed if it wrote none.
        nothing: W&B has everything.
    """

    run_dir: Path
    steps: int
    segments: int
    status: str
    nothing: bool

    def __str__(self) -> str:
        if self.nothing:
            return "nothing left to send"
        attempts = f" from {self.segments} offline attempts" if self.segments else ""
        return f"{self.steps} steps to send{attempts}" if self.steps else "final status to send"


def sync(folder: Path, dry_run: bool = False, timeout: float = 600) -> int:
    """Send what W&B does not have yet, for all runs in `folder`. Returns the exit status: a fault if one failed.

    Raises:
        UserError: no run was meant for W&B, or wandb is not installed.
    """
    setup_console(True)
    folder = folder.absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a run directory, or a folder with runs in it")
    runs = [run_dir for run_dir in find_runs(folder) if wandb_id(run_dir)]
    if not runs:
        raise UserError(
            f"{folder} contains no run for Weights & Biases, which needs tracking.wandb.mode=offline or online"
        )
    if not is_installed("wandb"):
        raise UserError("launch.sync needs wandb: pip install wandb")
    found = [find_unsent(run_dir) for run_dir in runs]
    if not dry_run:
        refuse_unwritable([unsent.run_dir for unsent in found if not unsent.nothing])
    failed = 0
    for unsent in found:
        name = unsent.run_dir.relative_to(folder.parent)
        if unsent.nothing or dry_run:
            print_line(f"{name}: {unsent}")
            continue
        try:
            send(unsent, timeout)
            print_line(f"{name}: sent")
        except UserError as error:
            failed += 1
            print_line(f"{name}: {error}")
        except OSError as error:
            failed += 1
            print_line(f"{name}: can't write what was sent: {error.strerror or error}")
    if failed:
        print_line(f"{failed} of {len(runs)} failed; run the same command to retry")
    return EXIT_FAULT if failed else 0


def refuse_unwritable(runs: Sequence[Path]) -> None:
    """Check that what is sent can be noted in the run directories: otherwise it would be sent again and again.

    Raises:
        UserError: names those where it can't.
    """
    reasons: dict[str, list[str]] = {}
    for run_dir in runs:
        try:
            (run_dir / "wandb").mkdir(exist_ok=True)
            probe = run_dir / "wandb" / f".{secrets.token_hex(8)}.tmp"
            write_atomic(probe, bytes(4096))
            probe.unlink()
        except OSError as error:
            reasons.setdefault(error.strerror or str(error), []).append(str(run_dir))
    if reasons:
        shown = "; ".join(f"{listed(names, 3)}: {reason}" for reason, names in reasons.items())
        raise UserError(f"what is sent can't be noted in {shown}. Nothing was sent")


def find_unsent(run_dir: Path) -> Unsent:
    """What W&B does not have of a run, according to the run directory."""
    marks, rows = Marks.of(run_dir, "online"), Rows(run_dir / "metrics.jsonl")
    steps = [step for step, _ in rows.whole()] if rows.path.exists() else []
    status = str((read_json(run_dir / "summary.json") or {}).get("status", "killed"))
    if status == "completed":
        steps.append(rows.last()[0])
    unsent = sum(step > marks.step for step in steps)
    nothing = marks.done if status == "completed" else unsent == 0 and marks.safe == marks.step
    return Unsent(run_dir, unsent, len(segments(run_dir)), status, nothing)


def send(unsent: Unsent, timeout: float) -> None:
    """Send one run, within `timeout` seconds.

    Raises:
        UserError: why nothing, or not all of it, was sent.
    """
    attempt = read_attempt(unsent.run_dir / ATTEMPT_FILE)
    settings, config = read_settings(unsent.run_dir)
    in_use = attempt is not None and "ended_at" not in attempt and is_alive(attempt)
    if in_use and settings.mode == "online":
        raise UserError("still training, and sends its metrics itself")
    task: Task = replace(wandb_task(unsent.run_dir, settings, config), mode="online")
    mirror = WandbClient(task, quiet=True)
    if not mirror.end(unsent.status, timeout):
        raise UserError(mirror.reason or "could not be sent")


def read_settings(run_dir: Path) -> tuple[WandbConfig, dict[str, Any]]:
    """From config.yaml: the W&B settings, and the whole configuration with unresolved interpolations (no secrets)."""
    try:
        source = OmegaConf.load(run_dir / "config.yaml")
        config: Any = OmegaConf.to_container(source, resolve=False)
        given = OmegaConf.merge(OmegaConf.structured(WandbConfig), source.tracking.wandb)
        settings = OmegaConf.to_object(given)
    except Exception as error:  # the parsers' own errors share no public base
        raise UserError(f"can't read config.yaml: {' '.join(str(error).split())}") from None
    assert isinstance(settings, WandbConfig)
    return settings, config


if __name__ == "__main__":
    raise SystemExit(main())
