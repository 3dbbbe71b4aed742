"""Opening a run: its state is restored, then its directory and records are opened."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from distil_tl.data.bad_images import BadImages
from distil_tl.data.source import ImageSource
from distil_tl.data.splits import Splits
from distil_tl.distributed.preemption import StopSignal
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.models.transfer import TransferModel
from distil_tl.run import Run
from distil_tl.rundir.changes import interpolation_digests
from distil_tl.rundir.checkpoint import Checkpoints
from distil_tl.rundir.directory import RunDirectory, check_shared
from distil_tl.rundir.lock import read_attempt
from distil_tl.rundir.opening import open_outputs, restore_state
from distil_tl.rundir.start import Start
from distil_tl.tracking.tracker import Tracker
from distil_tl.training.console import print_start
from distil_tl.utils.args import plain
from distil_tl.utils.files import writing
from distil_tl.utils.log import add_rank_file

if TYPE_CHECKING:
    from distil_tl.config import Config


def open_run(
    info: DistInfo,
    config: Config,
    unresolved: DictConfig,
    start: Start,
    splits: Splits,
    model: TransferModel,
    stop: StopSignal,
) -> Run:
    """Restore the state that `start` names, then open the run directory and its records. A collective.

    Args:
        unresolved: the configuration with its interpolations unresolved.

    Raises:
        UserError: the images are not those of the checkpoint, or a rank does not see the run directory.
        WriteError: the run directory can't be written to.
    """
    began = time.monotonic()
    state, train_state = restore_state(info, start, splits, model)
    run_dir = Path(start.run_dir)
    directory = RunDirectory(run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep, directory.attempt.check)

    def open_directory() -> str | None:
        with writing(run_dir):
            return open_outputs(info, unresolved, start, state, splits, directory, checkpoints)

    token = on_rank_zero(info, "opening the run directory", open_directory)
    check_shared(info, run_dir, lambda: (read_attempt(directory.attempt.path) or {}).get("token") == token)
    tracker = Tracker(run_dir, config.tracking, plain(unresolved), directory.attempt.check) if info.is_main else None

    def open_tracker() -> None:
        within_epoch = state.position is not None and state.position.consumed > 0
        if tracker is not None:
            tracker.open(after_step=state.step, within_epoch=within_epoch)

    on_rank_zero(info, "opening metrics.jsonl", open_tracker)
    info.log_to(add_rank_file(run_dir, info.rank))
    print_start(start.run_dir, state)
    bad_images = BadImages(config.data.on_bad_image, state.bad_images)
    model.module.to(info.device)
    return Run(
        info=info,
        config=config,
        source=ImageSource(info, config.data, splits.as_dict(), model.preprocess, bad_images),
        model=model,
        state=state,
        directory=directory,
        checkpoints=checkpoints,
        tracker=tracker,
        stop=stop,
        train_state=train_state,
        interpolated=interpolation_digests(dataclasses.asdict(config), unresolved),
        unsaved=start.checkpoint is not None and not start.is_own_checkpoint,
        saved_at=began,
        ticked_at=began,
    )
