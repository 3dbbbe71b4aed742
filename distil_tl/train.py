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
from typing import Any

from omegaconf import DictConfig

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.data.device import to_device
from distil_tl.data.feature_cache import feature_loader
from distil_tl.data.loader import Loader, plan_batches
from distil_tl.data.sampler import TrainSampler
from distil_tl.data.splits import bring_near, eval_batches, open_splits, train_batches
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.preemption import Request, StopAgreedError, StopRequest
from distil_tl.distributed.process_group import session
from distil_tl.distributed.rank_zero import on_rank_zero, once_per_node
from distil_tl.models.transfer import build, prepare_weights
from distil_tl.report import write_report
from distil_tl.run import Job, open_job
from distil_tl.rundir import checkpoint
from distil_tl.rundir.checkpoint import Position
from distil_tl.rundir.directory import Start, find_start
from distil_tl.training import console as summary
from distil_tl.training.evaluation import Evaluation, evaluate
from distil_tl.training.head_search import known_choice, search_stage
from distil_tl.training.metrics import Meter
from distil_tl.training.stage import StageConfig, check_stages, count_trainable
from distil_tl.training.stage_setup import get_ready
from distil_tl.training.step import StageRun, begin_stage, check_finite, settle_buckets, train_epoch
from distil_tl.utils.command import leave, run_command
from distil_tl.utils.errors import PreemptedError
from distil_tl.utils.log import Progress, logger, setup_console

IN_FULL: dict[str, Any] = {"confusion": True, "keep_mistakes": 50}


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
            if info.is_main and not (Path(start.run_dir) / "report.html").exists():  # killed just before it
                write_report(Path(start.run_dir))
            summary.say_completed(info, Path(start.run_dir))
            return
        splits = open_splits(info, config.data)
        once_per_node(info, "weights", lambda: prepare_weights(config.model))
        model = build(config.model, len(splits.classes), image_size=config.data.image_size, seed=config.seed)
        check_stages(model, config.stages)
        splits = bring_near(info, config.data, splits)  # last of all that may be refused, as it may take long
        stop.hold()
        job = open_job(info, config, source, start, splits, model, stop)
        try:
            for name, stage in config.stages.items():
                if not job.has_finished(name):
                    run_stage(job, name, stage)
            finish(job)
        except BaseException as error:
            job.abandon("preempted" if isinstance(error, PreemptedError) else "failed")
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
    stage, optim = known_choice(stage, job.config.optim, job.state.stages.get(name))
    info.phase = f"the beginning of stage {name}"
    began = time.monotonic()
    try:
        ready = get_ready(job, name, stage, loader.batch_size or 1)
        if stage.search.wanted:
            stage, optim = search_stage(job, name, stage, optim, ready)
    except StopAgreedError:
        job.preempt()
    network, record = ready.network, job.state.stages[name]
    if ready.features is not None:
        loader = feature_loader(ready.features.train, loader)
        val_loader = feature_loader(ready.features.val, val_loader)
    total_steps = stage.epochs * sampler.steps_per_epoch
    run = begin_stage(info, model, network, name, stage, optim, total_steps, remember=job.remembered_batches)
    settle_buckets(info, run, ready.example)
    record.seconds += time.monotonic() - began
    record.trainable_parameters = count_trainable(job.network)
    summary.say_stage(job, name, stage, sampler)

    position, meter = job.position(name), Meter(info, job.num_classes)
    if job.train_state is not None and job.train_state["stage"] == name:
        run.load_state(job.train_state)
        meter.load_state(job.train_state["meter"])
    job.train_state = None

    while position.epoch < stage.epochs:
        info.phase, info.begun = f"stage {name}, epoch {position.epoch + 1}", True
        train_one_epoch(job, run, sampler, loader, meter, position)
        trained = meter.total()
        job.bad_images.refuse_none_left(trained.count, "train", job.splits.train)
        info.phase = f"the evaluation after epoch {position.epoch + 1} of stage {name}"
        began = time.monotonic()
        try:
            batches = job.bad_images.read(to_device(val_loader, info.device), "val", job.splits.val)
            # What would be evaluated once more at the end is evaluated in full. (Not on CUDA, where to note mistakes
            # is to wait for the device.)
            in_full = network is job.network and info.device.type == "cpu"
            result = evaluate(
                info, network, val_loader, batches, job.num_classes,
                agreement=job.agreement, **(IN_FULL if in_full else {}),
            )  # fmt: skip
        except StopAgreedError:  # the epoch is trained, and its evaluation can be done again
            job.save(run, meter)
            job.preempt()
        job.bad_images.refuse_none_left(result.metrics.count, "val", job.splits.val)
        job.note_epoch(run, position.epoch, trained)
        is_best = job.note_evaluation(run, position.epoch, result.metrics, time.monotonic() - began)
        if is_best:
            job.best_evaluation = result if in_full else None
        summary.say_epoch(job, name)
        position = job.state.position = Position(name, position.epoch + 1, 0, position.step)
        meter = Meter(info, job.num_classes)
        job.save(run, meter, is_best=is_best)
        if job.agreement.ask() is Request.STOP:
            job.preempt()


def train_one_epoch(
    job: Job, run: StageRun, sampler: TrainSampler, loader: Loader, meter: Meter, position: Position
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
        info, run, job.bad_images.read(to_device(loader, info.device), "train", job.splits.train), sampler, meter,
        accumulation=plan.accumulation, optim=config.optim, seed=config.seed,
    )  # fmt: skip
    meter.start()
    for consumed in steps:
        position.step, position.consumed = position.step + 1, consumed
        bar.advance()
        at_end, asked = consumed == sampler.end, job.agreement.poll()
        if at_end or position.step % config.tracking.log_every == 0:
            check_finite(info, run, job.splits.train)
            line = job.note_training(run, position.epoch, *meter.interval())
            bar.say(summary.interval(line, consumed // sampler.global_batch_size, sampler.steps_per_epoch))
        every = config.checkpoint.every_steps
        due = asked is not Request.GO_ON or (every is not None and position.step % every == 0)
        if due and not at_end:  # at the end the evaluation comes first, and what it finds is saved with the rest
            check_finite(info, run, job.splits.train)
            job.save(run, meter)
            if asked is Request.STOP:
                bar.close()
                job.preempt()
    bar.close()


def finish(job: Job) -> None:
    """See that the best checkpoint is evaluated in full, and leave the run directory complete."""
    info, state = job.info, job.state
    on_rank_zero(info, "writing the last checkpoint", job.checkpoints.wait)
    shown = state.best or state.final
    assert shown is not None
    found = {} if job.best_evaluation is None else {"val": job.best_evaluation}
    missing = [split for split in ("test", "val") if split not in found and job.splits[split] is not None]
    if missing:
        found |= evaluate_best(job, shown["stage"], missing)
    if info.is_main:
        job.directory.write("evaluation.json", summary.evaluation("val", job.splits.val, found["val"]))
    job.bad_images.share(info)
    state.bad_images = job.bad_images.found
    state.best = shown
    more = {"test": found["test"].metrics.compute()} if "test" in found else {}
    # Others wait without a collective: W&B may take longer to finish than one may last.
    written = on_rank_zero(info, "closing the run", lambda: close(job, more))
    if info.is_main:
        summary.say_result(job.directory.path, written)


def evaluate_best(job: Job, stage: str, splits: list[str]) -> dict[str, Evaluation]:
    """The best checkpoint, which is of `stage`, on each of `splits`."""
    info, data, best = job.info, job.config.data, job.state.best
    if best is not None:  # else the run went on from a checkpoint whose best is not here: take what there is
        checkpoint.load_weights(job.checkpoints.path(best["step"]), job.model.module)
    image_size = job.image_size(job.config.stages[stage])
    job.network.fold(image_size, wanted=job.state.stages[stage].folded is not False).use(job.compute(stage))
    found: dict[str, Evaluation] = {}
    for split in splits:
        index = job.splits[split]
        assert index is not None
        info.phase = f"the final evaluation on {split}"
        loader = eval_batches(info, data, index, job.model.preprocess, image_size=image_size)
        batches = job.bad_images.read(to_device(loader, info.device), split, index)
        try:
            found[split] = evaluate(
                info, job.network, loader, batches, job.num_classes, agreement=job.agreement, **IN_FULL
            )
        except StopAgreedError:
            job.preempt()
        job.bad_images.refuse_none_left(found[split].metrics.count, split, index)
    return found


def close(job: Job, more: dict[str, Any]) -> dict[str, Any]:
    """Write what a completed run leaves behind, and end its tracking; its summary."""
    written = job.close("completed", **more)
    try:
        write_report(job.directory.path)
    except Exception as error:  # the run is complete whatever becomes of its picture
        logger.warning("can't write report.html: %s", error)
    job.end_tracking("completed")
    return written


if __name__ == "__main__":
    leave(main())
