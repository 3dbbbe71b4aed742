"""How a run starts: from the beginning, from a checkpoint, or not at all because it is complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_tl.rundir.checkpoint import Checkpoints, find_damage, load_state
from distil_tl.rundir.lock import Attempt
from distil_tl.rundir.state import RunState, planned
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import read_json
from distil_tl.utils.log import logger


@dataclass(frozen=True)
class Start:
    """Where a run starts. JSON-able, so that rank 0 can send it to the other ranks.

    Attributes:
        run_dir: of this run.
        checkpoint: folder of the checkpoint to resume from, None to begin.
        saved: its state.json.
        completed: there is nothing left to do.
    """

    run_dir: str
    checkpoint: str | None = None
    saved: dict[str, Any] | None = None
    completed: bool = False

    @property
    def saved_run_dir(self) -> Path | None:
        """The run directory that the checkpoint is in: this one, or the one that `resume` names."""
        return None if self.checkpoint is None else Path(self.checkpoint).parent.parent

    @property
    def saved_state(self) -> dict[str, Any]:
        """The state of the run in its checkpoint; empty without one."""
        state: dict[str, Any] = {} if self.saved is None else self.saved["run"]
        return state

    @property
    def is_own_checkpoint(self) -> bool:
        """Whether the checkpoint is one of this run directory."""
        return self.saved_run_dir is not None and self.saved_run_dir == Path(self.run_dir)


def find_start(run_dir: Path, resume: str, epochs: Mapping[str, Any]) -> Start:
    """Look for a checkpoint to resume from. Writes nothing.

    Args:
        resume: `auto`, `never`, or the path of a run directory or checkpoint.
        epochs: of each stage, by name.

    Raises:
        UserError: the run directory is in use, can't be written to, or holds a run although `resume` is `never`; or
            there is no valid checkpoint at the path that `resume` names.
    """
    Attempt(run_dir).refuse_if_in_use()
    start = _find_checkpoint(run_dir, resume, epochs)
    if not start.completed:
        _refuse_unwritable(run_dir)
    return start


def _find_checkpoint(run_dir: Path, resume: str, epochs: Mapping[str, Any]) -> Start:
    checkpoints = Checkpoints(run_dir / "checkpoints")
    own = checkpoints.newest_valid()
    if resume == "never":
        if own is not None or (run_dir / "metrics.jsonl").exists():
            raise UserError(
                f"resume=never, but {run_dir} already holds a run; choose another run_dir, delete it, or remove "
                f"resume=never to resume that run"
            )
        return Start(str(run_dir))
    if own is None and resume == "auto":
        return Start(str(run_dir))
    if own is None:
        checkpoint = _checkpoint_at(Path(resume))
        return Start(str(run_dir), str(checkpoint), load_state(checkpoint))
    if resume != "auto":
        logger.info("%s has checkpoints of its own, so resume=%s is ignored", run_dir, resume)
    saved = load_state(own)
    state = RunState.from_json(saved["run"])

    def has_finished(name: str, wanted: Any) -> bool:
        wanted = planned(name, wanted, state.resolved, begun=True)
        return wanted == 0 or (name in state.stages and state.stages[name].has_finished(wanted))

    finished = all(has_finished(name, wanted) for name, wanted in epochs.items())
    # Where the newest checkpoint is damaged, an older one is used and the rest is trained again.
    completed = finished and own == checkpoints.named("last") and _status(run_dir) == "completed"
    return Start(str(run_dir), str(own), saved, completed)


def _checkpoint_at(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest valid one of the run directory there."""
    if (path / "state.json").exists():
        damage = find_damage(path)
        if damage is not None:
            raise UserError(f"resume={path} is damaged: {damage}")
        return path.resolve()
    found = Checkpoints(path / "checkpoints").newest_valid()
    if found is None:
        raise UserError(f"resume={path} holds no valid checkpoint")
    return found


def _status(run_dir: Path) -> str | None:
    try:
        status: str = read_json(run_dir / "summary.json")["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status


def _refuse_unwritable(run_dir: Path) -> None:
    """Refuse a run directory that can't be written to, before any work is done."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        kind = "a file" if existing.exists() else "a broken symbolic link"
        raise UserError(f"run_dir={run_dir}: {existing} is {kind}; choose another run_dir")
    for folder in (existing, *(run_dir / name for name in ("checkpoints", "index", "logs"))):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"run_dir={run_dir}: {folder} can't be written to (its permissions, or a disk mounted read-only); "
                f"choose another run_dir"
            )
    probe = existing / f".{secrets.token_hex(8)}.tmp"
    try:  # in /proc and the like, folders can't be made whatever the permissions
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: can't write in {existing}: {error.strerror}") from None
