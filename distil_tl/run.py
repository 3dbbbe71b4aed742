"""What lives as long as a run: its state, its records, and how they are saved."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distil_tl.config import Config, interpolated
from distil_tl.data.bad_images import BadImages
from distil_tl.data.loader import plan_batches
from distil_tl.data.splits import Splits
from distil_tl.distributed.preemption import Agreement, Request, StopRequest
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.models.transfer import TransferModel
from distil_tl.rundir import checkpoint as ckpt
from distil_tl.rundir.checkpoint import Checkpoints, Position, find_fault
from distil_tl.rundir.directory import RunDirectory, RunState, Start, refuse_unseen
from distil_tl.rundir.lock import read_attempt
from distil_tl.tracking.tracker import Tracker
from distil_tl.training.evaluation import Evaluation
from distil_tl.training.metrics import ClassificationMetrics, Meter
from distil_tl.training.network import ImageNetwork
from distil_tl.training.optim import current_lr
from distil_tl.training.precision import Compute, usual_way
from distil_tl.training.stage import StageConfig
from distil_tl.training.step import StageRun
from distil_tl.utils.args import plain
from distil_tl.utils.errors import PreemptedError, SupersededError
from distil_tl.utils.files import writing
from distil_tl.utils.log import add_rank_file, logger


@dataclass
class Job:
    """One run in this process. Ranks hold equal ones, except that only rank 0 has a tracker and writes."""

    info: DistInfo
    config: Config
    splits: Splits
    model: TransferModel
    network: ImageNetwork
    state: RunState
    directory: RunDirectory
    checkpoints: Checkpoints
    tracker: Tracker | None
    stop: StopRequest
    bad_images: BadImages
    train_state: dict[str, Any] | None  # of the checkpoint the run goes on from, until its stage takes it
    clock: float
    saved_at: float
    interpolated: dict[str, str] = field(default_factory=dict)
    best_evaluation: Evaluation | None = None  # of the best checkpoint in full, if it was made here
    agreement: Agreement = field(init=False)

    def __post_init__(self) -> None:
        self.agreement = Agreement(self.info, self.due)

    @property
    def num_classes(self) -> int:
        return len(self.splits.classes)

    @property
    def remembered_batches(self) -> int:
        """How many micro-batches can pass between two looks at whether all is finite."""
        data = self.config.data
        plan = plan_batches(data.global_batch_size, self.info.world_size, data.max_local_batch_size)
        return self.config.tracking.log_every * plan.accumulation

    def image_size(self, stage: StageConfig) -> int:
        return stage.image_size or self.config.data.image_size or self.model.preprocess.crop_size

    def compute(self, name: str) -> Compute:
        """What stage `name`, which has begun, trains in."""
        record = self.state.stages.get(name)
        if record is None or record.precision is None:  # of a checkpoint of an earlier version
            return self.network.compute
        return Compute.parse(record.precision)

    def position(self, name: str) -> Position:
        """Where stage `name` begins or goes on."""
        at = self.state.position
        return at if at is not None and at.stage == name else Position(name, 0, 0, self.state.step)

    def has_finished(self, name: str) -> bool:
        epochs, record = self.config.stages[name].epochs, self.state.stages.get(name)
        return epochs == 0 or (record is not None and record.epochs >= epochs)

    def _log(self, run: StageRun, epoch: int, split: str, window: str, counted: ClassificationMetrics,
             seconds: float) -> dict[str, Any]:  # fmt: skip
        line = {
            "step": self.state.step,
            "epoch": epoch + 1,
            "stage": run.name,
            "split": split,
            "window": window,
            **counted.compute(),
            "lr": current_lr(run.optimizer),
            "images_per_second": counted.count / seconds if seconds else None,
            "seconds": seconds,
            "samples_seen": self.state.step * self.config.data.global_batch_size,
        }
        if self.tracker is not None:
            with writing(self.directory.path / "metrics.jsonl"):
                self.tracker.log(line)
        return line

    def note_training(
        self, run: StageRun, epoch: int, counted: ClassificationMetrics, seconds: float
    ) -> dict[str, Any]:
        """Record a log interval of training; the line written."""
        record = self.state.stages[run.name]
        record.train_images += counted.count
        record.train_seconds += seconds
        record.epoch_seconds += seconds
        record.seconds += seconds
        return self._log(run, epoch, "train", "interval", counted, seconds)

    def note_epoch(self, run: StageRun, epoch: int, counted: ClassificationMetrics) -> None:
        """Record an epoch of training, from however many attempts it took."""
        record = self.state.stages[run.name]
        record.train_top1 = counted.compute()["top1"]
        self._log(run, epoch, "train", "epoch", counted, record.epoch_seconds)
        record.epoch_seconds = 0.0

    def note_evaluation(self, run: StageRun, epoch: int, counted: ClassificationMetrics, seconds: float) -> bool:
        """Record the evaluation after an epoch; whether it is the best so far."""
        record = self.state.stages[run.name]
        line = self._log(run, epoch, "val", "epoch", counted, seconds)
        kept = ("split", "loss", "top1", "top5", "macro_f1", "stage", "epoch", "step")
        final = self.state.final = {key: line[key] for key in kept}
        record.epochs, record.top1 = epoch + 1, final["top1"]
        record.seconds += seconds
        best = self.state.best
        if best is None or (final["top1"], -final["loss"]) > (best["top1"], -best["loss"]):
            self.state.best = final
            return True
        return False

    def save(self, run: StageRun, meter: Meter, *, is_best: bool = False) -> None:
        """Write a checkpoint of this moment in the background. A collective: all ranks call it.

        Raises:
            CheckpointError: on rank 0, when the one before could not be written.
        """
        counted = meter.state()
        self.bad_images.share(self.info)
        self.state.bad_images = self.bad_images.found
        self.tick()
        self.saved_at = time.monotonic()
        if not self.info.is_main:
            return
        self.checkpoints.save(
            self.state.step,
            weights=self.model.module.state_dict(),
            train_state={"stage": run.name, "meter": counted, **run.state()},
            state={
                "format": 1,
                "run": self.state.to_json(),
                "world_size": self.info.world_size,
                "global_batch_size": self.config.data.global_batch_size,
                "interpolated": self.interpolated,
                "data": {"train": self.splits.train.fingerprint, "val": self.splits.val.fingerprint},
                "weights": asdict(self.model.weights),
                "preprocess": asdict(self.model.preprocess),
                "classes": list(self.splits.classes),
            },
            is_best=is_best,
        )

    def due(self) -> Request:
        """What this rank asks for: to stop when a signal said so, to save when rank 0's clock does."""
        if self.stop:
            return Request.STOP
        minutes = self.config.checkpoint.every_minutes
        if self.info.is_main and minutes is not None and time.monotonic() - self.saved_at > 60 * minutes:
            return Request.SAVE
        return Request.GO_ON

    def preempt(self) -> None:
        """End on all ranks, when what was saved is on disk."""
        # A rank that ended sooner would have its launcher end the one that writes.
        on_rank_zero(self.info, f"writing the checkpoint of step {self.state.step}", self.checkpoints.wait)
        on_rank_zero(self.info, "ending the tracking", lambda: self.abandon("preempted"))
        raise PreemptedError(
            f"stopped by a signal; everything up to step {self.state.step} is in {self.directory.path}, and the same "
            f"command goes on from there"
        )

    def tick(self) -> None:
        """Add the time since the last call to the run's total."""
        now = time.monotonic()
        self.state.seconds += now - self.clock
        self.clock = now

    def close(self, status: str, **more: Any) -> dict[str, Any]:
        """Write summary.json; on rank 0, what is in it."""
        self.tick()
        if self.tracker is None:
            return {}
        return self.directory.write_summary(status, self.state, self.info, **more)

    def abandon(self, status: str) -> None:
        """End the records of a run that does not get to its end; what fails here must not hide why."""
        try:
            try:
                self.checkpoints.wait()
            finally:  # not sooner: attempt.json then says that nobody writes here any more
                self.close(status)
        except SupersededError:
            status = "superseded"
        except OSError as error:
            logger.error("%s", error)
        self.end_tracking(status)

    def end_tracking(self, status: str) -> None:
        """Let the tracker send what is left, within bounds. Everything else is written by then."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.close(status)


def open_job(
    info: DistInfo,
    config: Config,
    source: DictConfig,
    start: Start,
    splits: Splits,
    model: TransferModel,
    stop: StopRequest,
) -> Job:
    """Open the run directory, and put model and state where `start` says.

    Raises:
        UserError: for images that are not those of the checkpoint, or a run directory that a rank does not see.
        WriteError: the run directory can't be written to.
    """
    clock = time.monotonic()
    run_dir = Path(start.run_dir)
    state, train_state = RunState(), None
    if start.checkpoint is not None:
        path = Path(start.checkpoint)
        refuse_unseen(info, path, path.is_dir)
        saved = ckpt.load_state(path)
        state = RunState.from_json(saved["run"])
        splits.refuse_drift(saved["data"], path.parent.parent)
        if state.best is not None and find_fault(Checkpoints(run_dir / "checkpoints").path(state.best["step"])):
            # Pruned, damaged, or in the directory of the run that this one goes on from.
            if path.parent == run_dir / "checkpoints":
                logger.warning(
                    "the best checkpoint, of step %d, is gone or damaged; best begins anew", state.best["step"]
                )
            state.best = None
        ckpt.load_weights(path, model.module)
        train_state = ckpt.load_train_state(path)
    directory = RunDirectory(run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep, directory.attempt.check)
    trackers: list[Tracker] = []

    @writing(run_dir)
    def begin() -> str | None:
        directory.begin(source, splits.classes, info, state.step)
        if start.checkpoint is not None and path.parent == checkpoints.folder:
            lost = path if checkpoints.named("best") else None  # which stands in for it, until there is a better one
            checkpoints.take_up(path, lost if state.best is None else checkpoints.path(state.best["step"]))
        splits.remember(run_dir)
        return directory.attempt.token

    @writing(run_dir / "metrics.jsonl")
    def begin_records() -> None:
        within = state.position is not None and state.position.consumed > 0
        trackers.append(
            Tracker(
                run_dir, config.tracking, plain(source),
                after_step=state.step, within_epoch=within, check=directory.attempt.check,
            )
        )  # fmt: skip

    token = on_rank_zero(info, "opening the run directory", begin)
    refuse_unseen(info, run_dir, lambda: (read_attempt(directory.attempt.path) or {}).get("token") == token)
    on_rank_zero(info, "opening the records", begin_records)
    add_rank_file(run_dir, info.rank)
    _say_start(start, state)
    return Job(
        info=info,
        config=config,
        interpolated=interpolated(config, source),
        splits=splits,
        model=model,
        network=ImageNetwork(model, usual_way(config.precision, model.module, info.device), info.device),
        state=state,
        directory=directory,
        checkpoints=checkpoints,
        tracker=trackers[0] if trackers else None,
        stop=stop,
        bad_images=BadImages(config.data.on_bad_image, state.bad_images),
        train_state=train_state,
        clock=clock,
        saved_at=clock,
    )


def _say_start(start: Start, state: RunState) -> None:
    if state.position is None:
        logger.info("run directory %s", start.run_dir)
        return
    at = state.position
    where = f"{at.consumed:,} samples into epoch {at.epoch + 1}" if at.consumed else f"after epoch {at.epoch}"
    logger.info("run directory %s, going on from step %d (stage %s, %s)", start.run_dir, at.step, at.stage, where)
