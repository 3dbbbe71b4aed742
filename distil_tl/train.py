"""The main job: `python -m distil_tl.train [CONFIG.yaml] [key=value ...]`, alone, under torchrun or under srun.

Reads top to bottom: settle the configuration, set up the ranks, look at the data once, build the model, run the
stages one after the other, evaluate.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from distil_tl import checkpoint, summary
from distil_tl import config as configuration
from distil_tl.checkpoint import Position
from distil_tl.commands import run_command
from distil_tl.config import Config
from distil_tl.data.loader import Loader, plan_batches
from distil_tl.data.sampler import TrainSampler
from distil_tl.data.splits import eval_batches, open_splits, train_batches
from distil_tl.distributed import average_buffers, on_rank_zero, once_per_node, read_launch, session
from distil_tl.engine import StageRun, begin_stage, check_finite, evaluate, train_epoch
from distil_tl.errors import PreemptedError
from distil_tl.files import write_json
from distil_tl.job import Job, open_job
from distil_tl.log import Progress, setup_console
from distil_tl.metrics import ClassificationMetrics
from distil_tl.models import build, prepare_weights
from distil_tl.report import write_report
from distil_tl.rundir import StageRecord, Start, find_start
from distil_tl.stages import StageConfig, count_trainable
from distil_tl.stopping import StopRequest


def main(args: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if args is None else list(args)
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(configuration.usage("python -m distil_tl.train"))
        return 0
    return run_command("distil_tl.train", lambda: train(*configuration.load(argv)))


def train(config: Config, source: DictConfig) -> None:
    """Run a configuration to its end, from wherever its run directory is.

    Raises:
        UserError: before any work, when the configuration, the data or the weights can't work.
        PreemptedError: a signal asked to stop, and a checkpoint was saved.
        NonFiniteError: the training diverged; the last good checkpoint stays.
    """
    launch = read_launch(os.environ)
    setup_console(launch.rank == 0)
    configuration.check(config, launch.world_size)
    with StopRequest() as stop, session(launch, config.distributed) as info:
        start = Start(**on_rank_zero(info, "start", lambda: dataclasses.asdict(find_start(config, source))))
        if start.completed:
            summary.say_completed(info, Path(start.run_dir))
            return
        splits = open_splits(info, config.data)
        once_per_node(info, "weights", lambda: prepare_weights(config.model))
        model = build(config.model, len(splits.classes), image_size=config.data.image_size, seed=config.seed)
        job = open_job(info, config, source, start, splits, model, stop)
        try:
            for name, stage in config.stages.items():
                if not job.has_finished(name):
                    run_stage(job, name, stage)
            finish(job)
        except BaseException as error:
            job.close("preempted" if isinstance(error, PreemptedError) else "failed")
            raise


def run_stage(job: Job, name: str, stage: StageConfig) -> None:
    """Train a stage from where it is to its end: epochs, each followed by an evaluation and a checkpoint."""
    info, data, model = job.info, job.config.data, job.model
    image_size, augment = job.image_size(stage), stage.augment or data.augment
    sampler, loader = train_batches(
        info, data, job.splits.train, model.preprocess,
        image_size=image_size, augment=augment, seed=job.config.seed, stage=name,
    )  # fmt: skip
    val_loader = eval_batches(info, data, job.splits.val, model.preprocess, image_size=image_size)
    total_steps = stage.epochs * sampler.steps_per_epoch
    run = begin_stage(info, model, job.network, name, stage, job.config.optim, total_steps)
    record = job.state.stages.setdefault(name, StageRecord())
    record.trainable_parameters = count_trainable(job.network)
    summary.say_stage(job, name, stage, sampler)

    position = job.position(name)
    metrics = ClassificationMetrics(job.num_classes, info.device)
    if job.train_state is not None and job.train_state["stage"] == name:
        run.load_state(job.train_state)
        if info.is_main:  # the sums are over all ranks, of whatever number
            metrics.load_state(job.train_state["metrics"])
    job.train_state = None

    while position.epoch < stage.epochs:
        train_one_epoch(job, run, sampler, loader, metrics, position)
        if stage.batch_norm == "train":
            average_buffers(info, model.module)
        began = time.monotonic()
        result = evaluate(info, job.network, val_loader, job.num_classes).metrics
        is_best = job.note_evaluation(run, position.epoch, result, time.monotonic() - began)
        summary.say_epoch(job, name)
        position = job.state.position = Position(name, position.epoch + 1, 0, position.step)
        metrics = ClassificationMetrics(job.num_classes, info.device)
        job.save(run, metrics, is_best=is_best)
        if job.stop.ask():
            job.preempt()


def train_one_epoch(
    job: Job,
    run: StageRun,
    sampler: TrainSampler,
    loader: Loader,
    metrics: ClassificationMetrics,
    position: Position,
) -> None:
    """Take the rest of an epoch's steps. `position` moves along with them, as the run's state."""
    info, config = job.info, job.config
    plan = plan_batches(config.data.global_batch_size, info.world_size, config.data.max_local_batch_size)
    job.state.position = position
    sampler.set_position(position.epoch, position.consumed)
    bar = Progress(
        f"{run.name} {position.epoch + 1}/{config.stages[run.name].epochs}",
        sampler.steps_per_epoch,
        done=position.consumed // sampler.global_batch_size,
        show=info.is_main,
    )
    steps = train_epoch(
        info, run, loader, sampler, metrics,
        accumulation=plan.accumulation, optim=config.optim, seed=config.seed,
    )  # fmt: skip
    before, since = metrics.reduce(info), time.monotonic()
    for consumed in steps:
        position.step, position.consumed = position.step + 1, consumed
        bar.advance()
        stopping = job.stop.poll()
        if position.step % config.tracking.log_every == 0 or stopping or consumed == sampler.end:
            check_finite(info, run, position.step)
            total, now = metrics.reduce(info), time.monotonic()
            line = job.note_training(run, position.epoch, total.since(before), now - since)
            bar.say(summary.interval(line, consumed // sampler.global_batch_size, sampler.steps_per_epoch))
            before, since = total, now
        if stopping:
            bar.close()
            job.save(run, metrics)
            job.preempt()
    bar.close()
    job.note_epoch(run, position.epoch, before)


def finish(job: Job) -> None:
    """Evaluate the best checkpoint once more, in full, and leave the run directory complete."""
    info, data, state = job.info, job.config.data, job.state
    assert state.best is not None
    checkpoint.load_weights(job.checkpoints.path(state.best["step"]), job.model.module)
    image_size = job.image_size(job.config.stages[state.best["stage"]])
    test: dict[str, float] | None = None
    for split in ("test", "val"):
        index = job.splits[split]
        if index is None:
            continue
        batches = eval_batches(info, data, index, job.model.preprocess, image_size=image_size)
        result = evaluate(info, job.network, batches, job.num_classes, confusion=True, keep_mistakes=50)
        if split == "test":
            test = result.metrics.compute()
        elif info.is_main:
            write_json(job.directory.path / "evaluation.json", summary.evaluation(split, index, result))
    written = job.close("completed", **({"test": test} if test else {}))
    if info.is_main:
        write_report(job.directory.path)
        summary.say_result(job.directory.path, written)


if __name__ == "__main__":
    sys.exit(main())
