"""A run in progress: its state, records, checkpoints, and stopping."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distil_tl.data.loader import BatchPlan, plan_batches
from distil_tl.data.pixels import pixel_digests
from distil_tl.data.source import ImageSource
from distil_tl.distributed.preemption import Agreement, Request, StopSignal
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.models.transfer import TransferModel
from distil_tl.report import write_report
from distil_tl.rundir.checkpoint import Checkpoints, find_damage, load_weights
from distil_tl.rundir.directory import RunDirectory, check_shared
from distil_tl.rundir.state import Position, RunState
from distil_tl.tracking.tracker import Tracker
from distil_tl.training.auto_rules import auto_layer_decay, auto_lr
from distil_tl.training.evaluation import Evaluation
from distil_tl.training.precision import Compute, default_compute
from distil_tl.training.records import Records
from distil_tl.training.samples import write_samples
from distil_tl.training.stage import Stage
from distil_tl.training.step import StageTraining
from distil_tl.utils.auto import AUTO
from distil_tl.utils.errors import PreemptedError, SupersededError
from distil_tl.utils.log import logger

if TYPE_CHECKING:
    from distil_tl.config import Config


@dataclass
class Run:
    """One run in this process. It is equal on all ranks, but only rank 0 writes.

    Attributes:
        source: the images of the run, as batches.
        plan: how a global batch is divided.
        records: writes metrics.jsonl and keeps the results of stages.
        tracker: metrics.jsonl and W&B; None on other ranks than 0.
        train_state: of the checkpoint that the run resumes from, until its stage has loaded it.
        training: state of the current stage's training; None before the first stage.
        saved_at: time of the last checkpoint, monotonic seconds.
        ticked_at: the run's total time is counted up to here, monotonic seconds.
        unsaved: no checkpoint of this run directory holds the current state.
        best_evaluation: the full evaluation of the best checkpoint, if this process made it.
    """

    info: DistInfo
    config: Config
    source: ImageSource
    model: TransferModel
    state: RunState
    directory: RunDirectory
    checkpoints: Checkpoints
    tracker: Tracker | None
    stop: StopSignal
    train_state: dict[str, Any] | None
    interpolated: dict[str, str] = field(default_factory=dict)
    training: StageTraining | None = None
    saved_at: float = field(default_factory=time.monotonic)
    ticked_at: float = field(default_factory=time.monotonic)
    unsaved: bool = False
    best_evaluation: Evaluation | None = None
    plan: BatchPlan = field(init=False)
    agreement: Agreement = field(init=False)
    records: Records = field(init=False)

    def __post_init__(self) -> None:
        data = self.config.data
        self.plan = plan_batches(data.global_batch_size, self.info.world_size, data.max_local_batch_size)
        self.agreement = Agreement(self.info, self.request)
        write = None if self.tracker is None else self.tracker.log
        config = self.config
        self.records = Records(self.state, write, data.global_batch_size, config.metric, prefer_last=config.prefer_last)

    @property
    def num_classes(self) -> int:
        return len(self.source.index("train").classes)

    # Stages.

    def has_finished(self, name: str) -> bool:
        config, record = self.config.stages[name], self.state.stages.get(name)
        skipped = bool(config.epochs == 0)
        if skipped or record is None:
            return skipped
        return record.has_finished(config.epochs) and not (config.wise_ft and record.wise_ft is None)

    def is_last_stage(self, stage: Stage) -> bool:
        """Whether no stage that trains is configured after this one."""
        return stage.name == [name for name, config in self.config.stages.items() if config.epochs != 0][-1]

    def is_last(self, stage: Stage, epoch: int) -> bool:
        """Whether no evaluation is configured after that of this epoch, counted from 0."""
        return self.is_last_stage(stage) and epoch + 1 == stage.config.epochs and not stage.config.wise_ft

    def stage(self, name: str) -> Stage:
        """A stage with its settings resolved, including those that are `auto` and those that a head search chose."""
        config, own = self.config, self.config.stages[name]
        record = self.state.stages.get(name)
        own = replace(own, **self.auto_rates(name))
        return Stage(
            name=name,
            config=own,
            optim=config.optim,
            image_size=own.image_size or config.data.image_size or self.model.preprocess.crop_size,
            augment=config.augment_of(own),
            seed=config.seed,
            precision=config.precision,
            compile=config.compile,
            compile_mode=config.compile_mode,
            metric=config.metric,
            balance=config.data.balance,
        ).with_search_result(None if record is None else record.search)

    def auto_rates(self, name: str) -> dict[str, Any]:
        """`lr` and `layer_decay` of a stage where they are `auto`: recorded, or by the accuracy of the stage before."""
        config, record = self.config.stages[name], self.state.stages.get(name)
        before = list(self.config.stages)[: list(self.config.stages).index(name)]
        reached = [self.state.stages[other].best for other in before if other in self.state.stages]
        top1 = reached[-1]["top1"] if reached and reached[-1] else None
        found = {}
        for key, rule in (("lr", auto_lr), ("layer_decay", auto_layer_decay)):
            if getattr(config, key) == AUTO:
                recorded = getattr(record, key, None)
                found[key] = rule(top1, self.num_classes) if recorded is None else recorded
        return found

    def has_entered(self, name: str) -> bool:
        """Whether the state of the run is one within this stage."""
        return self.state.position is not None and self.state.position.stage == name

    def compute(self, name: str) -> Compute:
        """Precision and memory format of the trained part of a stage that has begun."""
        record = self.state.stages[name]
        if record.precision is None:  # in a checkpoint of an early version
            return default_compute(self.config.precision, self.model.module, self.info.device)
        return Compute.parse(record.precision)

    def enter(self, training: StageTraining) -> Position:
        """Make `training` the current stage, restore it from a checkpoint, start to load. Returns where it starts."""
        name, at = training.stage.name, self.state.position
        if at is None or at.stage != name:
            at = Position(name, 0, 0, self.state.step)
        if self.train_state is not None and self.train_state["stage"] == name:
            training.load_state(self.train_state)
            training.meter.load_state(self.train_state["meter"])
        self.train_state, self.training = None, training
        is_resumed = (at.epoch, at.consumed) != (0, 0)
        write_samples(self.info, self.directory.path, training, self.source, is_resumed=is_resumed)
        training.batches.start(at.epoch, at.consumed)
        return at

    def stop_early(self, stage: Stage) -> None:
        """End a stage that is out of patience, with the weights of its best epoch. A collective.

        The checkpoint that follows has these weights, so that the next stage starts from them, also after a kill.
        """
        record = self.state.stages[stage.name]
        if record.has_finished(stage.config.epochs) or not record.is_out_of_patience(stage.config.patience):
            return
        assert record.best is not None
        record.stopped_early = True
        if self.training is not None:
            self.training.weights.adopt_average()
        path = self.checkpoints.path(record.best["step"])

        def damage() -> str | None:
            self.checkpoints.wait()
            return find_damage(path)

        if reason := on_rank_zero(self.info, "checking the best checkpoint of the stage", damage):
            logger.warning("the best weights of stage %s are lost (%s): the last ones are used", stage.name, reason)
            return
        check_shared(self.info, path, path.is_dir)
        load_weights(path, self.model.module)

    # Checkpoints.

    def request(self) -> Request:
        """The request of this rank: stop after a signal, save when it is time by rank 0's clock."""
        if self.stop:
            return Request.STOP
        minutes = self.config.checkpoint.every_minutes
        if self.info.is_main and minutes is not None and time.monotonic() - self.saved_at > 60 * minutes:
            return Request.SAVE
        return Request.CONTINUE

    def save(self, training: StageTraining, *, is_best: bool = False) -> None:
        """Write a checkpoint of the current state in the background. A collective: all ranks call it.

        Raises:
            CheckpointError, SupersededError: on rank 0, when the previous one could not be written.
        """
        counted = training.meter.state()
        best = None if training.stage.config.patience is None else self.state.stages[training.stage.name].best
        self.source.bad_images.combine_ranks(self.info)
        self.state.bad_images = self.source.bad_images.by_split
        self.tick()
        self.saved_at, self.unsaved = time.monotonic(), False
        if not self.info.is_main:
            return
        self.checkpoints.save(
            self.state.step,
            weights=training.weights.state_dict(self.model.module),
            train_state={"stage": training.stage.name, "meter": counted, **training.state()},
            state={
                "format": 1,
                "run": self.state.to_json(),
                "world_size": self.info.world_size,
                "global_batch_size": self.config.data.global_batch_size,
                "interpolated": self.interpolated,
                "data": {split: self.source.index(split).fingerprint for split in ("train", "val")},
                "pixels": pixel_digests(self.config.data),
                "weights": asdict(self.model.weights),
                "preprocess": self.model.preprocess.to_json(),
                "classes": list(self.source.index("train").classes),
            },
            is_best=is_best,
            kept_step=None if best is None else best["step"],
        )

    def tick(self) -> None:
        """Add the time since the last call to the run's total."""
        now = time.monotonic()
        self.state.seconds += now - self.ticked_at
        self.ticked_at = now

    # Stopping.

    def preempt(self) -> PreemptedError:
        """Save what is not saved yet and close the records, after all ranks agreed to stop. A collective.

        Returns the exception to raise.
        """
        if self.unsaved and self.training is not None:
            self.save(self.training)
        self.info.leave(orderly=True, seconds=None)  # what is written now must not be cut off
        # If a rank exited earlier, its launcher would kill the rank that writes.
        on_rank_zero(self.info, f"writing the checkpoint of step {self.state.step}", self.checkpoints.wait)
        on_rank_zero(self.info, "ending the tracking", lambda: self.abandon("preempted"))
        if self.info.is_main and self.checkpoints.named("last") is None:
            return PreemptedError("stopped before the first checkpoint; run the same command to start again")
        return PreemptedError(
            f"stopped by a signal; everything up to step {self.state.step} is saved in {self.directory.path}. Run the "
            f"same command to resume, or `distil-tl report {self.directory.path}` for a report of the run so far"
        )

    def write_summary(self, status: str, **more: Any) -> dict[str, Any]:
        """Write summary.json on rank 0. Returns its content there."""
        self.tick()
        return self.directory.write_summary(status, self.state, self.info, **more) if self.info.is_main else {}

    def complete(self, **more: Any) -> dict[str, Any]:
        """Write summary.json and report.html on rank 0, and end the tracking. Returns the summary.

        Args:
            more: fields of the summary.
        """
        summary = self.write_summary("completed", **more)
        try:
            write_report(self.directory.path)
        except Exception as error:  # the run is complete without its report
            logger.warning("can't write report.html: %s", error)
        if self.tracker is not None:
            self.tracker.close("completed")
        return summary

    def abandon(self, status: str) -> None:
        """Close the records of a run that does not complete. Errors here must not hide the reason for that."""
        self.info.leave(orderly=status != "failed", seconds=120 + self.config.tracking.wandb.finish_timeout_seconds)
        if self.tracker is None or self.tracker.closed:
            return
        try:
            try:
                self.checkpoints.wait()
            finally:  # in this order, as summary.json and attempt.json say that this process writes no more
                self.write_summary(status)
        except SupersededError:
            status = "superseded"
        except OSError as error:
            logger.error("%s", error)
        self.tracker.close(status)
