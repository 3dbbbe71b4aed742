"""Opening a run directory: restore the state of a checkpoint, then claim the directory for this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distil_tl.data.pixels import refuse_changed_pixels
from distil_tl.data.splits import Splits
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.transfer import TransferModel
from distil_tl.rundir.changes import refuse_changes
from distil_tl.rundir.checkpoint import Checkpoints, find_damage, load_train_state, load_weights
from distil_tl.rundir.directory import RunDirectory, check_shared
from distil_tl.rundir.queued_job import warn_of_queued_job
from distil_tl.rundir.start import Start, find_start
from distil_tl.rundir.state import RunState
from distil_tl.utils.command import has_restarted
from distil_tl.utils.log import logger


def look_for_start(values: dict[str, Any], unresolved: DictConfig) -> Start:
    """Where a run starts. Writes nothing.

    Args:
        values: the configuration as nested dicts.
        unresolved: the same with its interpolations unresolved.

    Raises:
        UserError: the run directory can't be used, or holds a run that this configuration can't resume.
    """
    epochs = {name: stage["epochs"] for name, stage in values["stages"].items()}
    # The run that a process found new, and had to start again, is its own.
    resume = "auto" if values["resume"] == "never" and has_restarted() else values["resume"]
    start = find_start(Path(values["run_dir"]), resume, epochs)
    if start.saved is not None and start.saved_run_dir is not None:
        refuse_changes(values, unresolved, start.saved, start.saved_run_dir)
    return start


def restore_state(
    info: DistInfo, start: Start, splits: Splits, model: TransferModel
) -> tuple[RunState, dict[str, Any] | None]:
    """The state that `start` names, with the weights loaded into `model`, and the optimizer's state. Writes nothing.

    Raises:
        UserError: the images or their decoded pixels are not those of the checkpoint, or a rank does not see it.
    """
    if start.checkpoint is None or start.saved is None or start.saved_run_dir is None:
        return RunState(), None
    path = Path(start.checkpoint)
    check_shared(info, path, path.is_dir)
    state = RunState.from_json(start.saved["run"])
    splits.refuse_changed_images(start.saved["data"], start.saved_run_dir)
    refuse_changed_pixels(start.saved.get("pixels", {}), start.saved_run_dir)
    checkpoints = Checkpoints(Path(start.run_dir) / "checkpoints")
    if state.best is not None and find_damage(checkpoints.path(state.best["step"])) is not None:
        # Removed, damaged, or in the directory of another run that this one resumes from.
        if start.is_own_checkpoint:
            logger.warning(
                "the best checkpoint, of step %d, is missing or damaged; the best result is determined again",
                state.best["step"],
            )
        state.best = None
    load_weights(path, model.module)
    return state, load_train_state(path)


def open_outputs(
    info: DistInfo,
    unresolved: DictConfig,
    start: Start,
    state: RunState,
    splits: Splits,
    directory: RunDirectory,
    checkpoints: Checkpoints,
) -> str | None:
    """Claim the run directory and write the files that describe the run, on rank 0. Returns the token of the claim."""
    warn_of_queued_job(directory.path)
    directory.open(unresolved, splits.classes, info, state.step)
    if start.checkpoint is not None and start.is_own_checkpoint:
        newest = Path(start.checkpoint)
        best = checkpoints.path(state.best["step"]) if state.best is not None else None
        if best is None and checkpoints.named("best"):  # the best one is lost: the newest replaces it for now
            best = newest
        checkpoints.repair_links(newest, best)
    splits.save(directory.path)
    return directory.attempt.token
