"""The main job: `python -m distil_tl.train [CONFIG.yaml] [key=value ...]`, alone, under torchrun or under srun.

Reads top to bottom: check the configuration, set up the ranks, scan the data, build the model, train stages, evaluate.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from distil_tl import arguments
from distil_tl.auto_settings import settle
from distil_tl.config import Config, check, load
from distil_tl.utils.command import exit_process, run_command

if __name__ == "__main__":  # before torch is imported, so that a typo is refused in less than a second
    arguments.check_arguments("distil_tl.train", sys.argv[1:])

import torch
from torch import Tensor

from distil_tl.data.loader import Batch
from distil_tl.data.splits import copy_to_local_disk, open_splits
from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.leaving import cause_of
from distil_tl.distributed.preemption import AllRanksStopError, Request, StopSignal
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.distributed.rank_zero import on_rank_zero, once_per_node
from distil_tl.finish import end_stage, finish
from distil_tl.inference import restore_model
from distil_tl.models.transfer import build
from distil_tl.models.weight_sources import download_weights
from distil_tl.open_run import open_run
from distil_tl.report import write_report
from distil_tl.run import Run
from distil_tl.rundir.directory import peak_memory_mb, reset_peak_memory
from distil_tl.rundir.opening import look_for_start
from distil_tl.rundir.start import Start
from distil_tl.rundir.state import Position, StageRecord
from distil_tl.teacher import add_teacher, refuse_unfit_teachers, split_of_teacher, teacher_file
from distil_tl.time_limit import limit_epochs
from distil_tl.training import console
from distil_tl.training.evaluation import MISTAKES, evaluate
from distil_tl.training.head_search import search_head
from distil_tl.training.heads.config import network_head
from distil_tl.training.heads.stage_head import fit_head
from distil_tl.training.memory import replayed, until_memory_suffices
from distil_tl.training.metrics import Meter
from distil_tl.training.network import ImageNetwork
from distil_tl.training.optim import lr_factor, set_lr
from distil_tl.training.precision import set_rounding
from distil_tl.training.stage import Stage, check_stages, count_trainable
from distil_tl.training.stage_fit import refuse_unfit_stages
from distil_tl.training.stage_setup import StageSetup, set_up_stage
from distil_tl.training.stage_start import begin_stage
from distil_tl.training.step import (
    StageTraining,
    average_statistics,
    check_finite,
    optimizer_step,
    reduce_gradients,
)
from distil_tl.utils.errors import PreemptedError, RestartError
from distil_tl.utils.log import Progress, setup_console
from distil_tl.utils.rng import seed_torch


def main(args: Sequence[str] | None = None, program: str = "distil_tl.train") -> int:
    """The command; `program` is how the user started it, with which messages begin."""
    argv = sys.argv[1:] if args is None else list(args)
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(arguments.usage(arguments.called(program)))
        return 0
    return run_command(program, lambda: train(*load(argv)))


def train(config: Config, unresolved: DictConfig) -> None:
    """Train a configuration to its end, from wherever its run directory is.

    Args:
        unresolved: the configuration with its interpolations unresolved.

    Raises:
        UserError: before any work, when the configuration, the data or the weights can't be used.
        PreemptedError: stopped by a signal, after a checkpoint was saved.
        NonFiniteError: the training diverged; the last good checkpoint is kept.
    """
    launch = read_launch(os.environ)
    setup_console(launch.rank == 0)
    check(config, launch.world_size)
    set_rounding(tf32=config.tf32, deterministic=config.deterministic)
    with StopSignal() as stop, init_distributed(launch, config.distributed) as info:
        # Rank 0 looks, and sends what it finds to the other ranks as JSON.
        start = Start(**on_rank_zero(info, "start", lambda: asdict(look_for_start(asdict(config), unresolved))))
        if start.completed:
            if info.is_main and not (Path(start.run_dir) / "report.html").exists():  # killed just before it
                write_report(Path(start.run_dir))
            console.print_completed(info, Path(start.run_dir))
            return
        on_rank_zero(info, "stages", lambda: refuse_unfit_stages(config.model, config.stages, config.data.image_size))
        once_per_node(info, "weights", lambda: download_weights(config.model))
        splits = open_splits(info, config.data, start.saved_run_dir or split_of_teacher(config))
        config, resolved = settle(info, config, splits.train, start.saved_state)
        classes, head = len(splits.classes), network_head(config.stages)
        model = build(config.model, classes, image_size=config.data.image_size, seed=config.seed, head_kind=head)
        model.preprocess = model.preprocess.with_crop(config.data.crop_mode, config.data.crop_pct)
        check_stages(model, config.stages)
        on_rank_zero(info, "teachers", lambda: refuse_unfit_teachers(config, splits.classes))
        splits = copy_to_local_disk(info, config.data, splits)  # last of what may be refused, as it may take long
        stop.defer()
        run = open_run(info, config, unresolved, start, splits, model, stop)
        run.state.resolved = resolved
        try:
            try:
                for name in config.stages:
                    if not run.has_finished(name):
                        run_stage(run, run.stage(name))
                finish(run)
            except AllRanksStopError:
                raise run.preempt() from None
        except BaseException as error:
            stopped = isinstance(cause_of(info, error), (PreemptedError, RestartError))
            run.abandon("preempted" if stopped else "failed")
            raise
        finally:
            run.training = None  # ends its loader processes


def run_stage(run: Run, stage: Stage) -> None:
    """Train a stage from where it is to its end: epochs, each followed by an evaluation and a checkpoint."""
    info, model = run.info, run.model
    record = run.state.stages.setdefault(stage.name, StageRecord())
    for key, value in run.auto_rates(stage.name).items():  # `stage.lr` may be of its head search
        setattr(record, key, value)
    info.phase = f"the set-up of stage {stage.name}"
    began = time.monotonic()
    setup = set_up_stage(info, stage, model, run.source, record, run.plan.micro, run.agreement)
    if stage.config.distill.teacher is not None:
        trained = teacher_file(run, stage) or restore_model(stage.config.distill.teacher)
        setup = add_teacher(run, stage, setup, trained)
    if stage.config.search.wanted:
        stage = search_head(info, stage, setup, run.source, record, run.agreement)
    log_every = run.config.tracking.log_every
    if run.config.max_minutes is not None and not run.has_entered(stage.name) and not stage.config.fits_head:
        stage = limit_epochs(
            run, stage, lambda: begin_stage(info, stage, model, setup, run.source, run.plan, record, log_every),
            accumulate_gradients,
        )  # fmt: skip
    training = begin_stage(info, stage, model, setup, run.source, run.plan, record, log_every)
    reset_peak_memory(info)  # trials need more than training
    record.seconds += time.monotonic() - began
    record.trainable_parameters = count_trainable(model.module)
    console.print_stage(info, model, training, record)

    position = run.enter(training)
    while not record.has_finished(stage.config.epochs):
        if stage.config.fits_head:
            fit_in_one_step(run, training, setup, position)
        else:
            train_one_epoch(run, training, position)
        position = evaluate_epoch(run, training, position)
        if run.agreement.exchange_now() is Request.STOP:
            raise AllRanksStopError
    end_stage(run, training)
    run.training = None  # frees optimizer, gradients and loader processes before the next stage is set up


def train_one_epoch(run: Run, training: StageTraining, position: Position) -> None:
    """The steps of an epoch that are left, with log lines and checkpoints. `position` advances with them."""
    info, stage, sampler = run.info, training.stage, training.sampler
    log_every, save_every = run.config.tracking.log_every, run.config.checkpoint.every_steps
    info.phase, info.training_started = f"stage {stage.name}, epoch {position.epoch + 1}", True
    run.state.position = position
    done, total = position.consumed // sampler.global_batch_size, sampler.steps_per_epoch
    label = f"{stage.name} {position.epoch + 1}/{stage.config.epochs}"
    training.meter.start()
    with Progress(label, total, done=done, show=info.is_main) as bar:
        for step in training.steps_left(position):
            set_lr(training.optimizer, lr_factor(step, training.total_steps, stage.optim.warmup, stage.optim.schedule))
            loss = accumulate_gradients(info, training, step)
            training.batches.start_val()  # now that the first batches of training are loaded
            optimizer_step(training, loss, step)
            average_statistics(info, training)
            training.weights.after_step(step)
            position.step, position.consumed = position.step + 1, position.consumed + sampler.global_batch_size
            run.unsaved = True
            bar.advance()

            at_end, asked = position.consumed == sampler.end, run.agreement.exchange()
            if at_end or position.step % log_every == 0:
                check_finite(info, training)
                line = run.records.add_interval(training.moment(position), *training.meter.interval())
                bar.show(console.interval_line(line, position.consumed // sampler.global_batch_size, total))
            due = asked is not Request.CONTINUE or (save_every is not None and position.step % save_every == 0)
            if due and not at_end:  # at the end of an epoch the evaluation comes first, and is saved with the rest
                check_finite(info, training)
                run.save(training)
                if asked is Request.STOP:
                    raise AllRanksStopError


def fit_in_one_step(run: Run, training: StageTraining, setup: StageSetup, position: Position) -> None:
    """Fit the head of a stage to all features, in place of an epoch of steps. It counts as one step."""
    info, stage = run.info, training.stage
    info.phase = f"the fit of stage {stage.name}"
    counts = fit_head(info, stage, setup, run.source, run.state.stages[stage.name], run.agreement)
    training.meter.add(counts)
    set_lr(training.optimizer, 0.0)
    training.batches.start_val()
    run.state.position = position
    position.step += 1
    run.unsaved = False  # until its evaluation is complete, a run that is stopped fits it again


def accumulate_gradients(info: DistInfo, training: StageTraining, step: int) -> Tensor:
    """Forward and backward passes of a step, repeated in smaller parts where memory runs out. Returns its loss."""
    taken: list[Batch] = []
    training.begin_step()

    def attempt() -> Tensor:
        loss = torch.zeros((), device=info.device)
        for micro, batch in enumerate(replayed(training.next_batch, training.accumulation, taken)):
            loss += forward_backward(info, training, batch, step, micro)
        return loss

    loss = until_memory_suffices(attempt, training.recover)
    training.end_step()
    training.recent.extend((step, batch.all_indices) for batch in taken)
    return loss


def forward_backward(info: DistInfo, training: StageTraining, batch: Batch, step: int, micro: int) -> Tensor:
    """Forward, loss and backward of a micro-batch, in parts where memory is short. Returns its loss, on the device.

    The gradient is that of the sum of losses over the global batch divided by its size, for any number of ranks and
    micro-batches. An image that is left out adds nothing to the sum.
    """
    stage = training.stage
    # A key for dropout and stochastic depth, so that a resumed run draws the same.
    seed_torch(info.device, stage.seed, "step", stage.name, step, micro, info.rank)
    total = torch.zeros((), device=info.device)
    parts = training.parts(batch)
    for i, part in enumerate(parts):
        is_last = micro == training.accumulation - 1 and i == len(parts) - 1
        taught = training.taught(part, step)
        with reduce_gradients(training.network, now=is_last):
            logits = training.network(part.images)
            # From here on the ranks expect each other's gradients: DDP can't forget a forward pass.
            training.reducing = is_last and info.world_size > 1
            losses = training.losses(logits, taught, part)
            # DDP averages over the ranks, so each rank divides by its share of the global batch.
            loss = (losses * part.valid).sum() / (training.sampler.global_batch_size // info.world_size)
            training.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        training.add_output(logits.detach(), part, losses.detach())
        total += loss.detach()
    return total


def evaluate_epoch(run: Run, training: StageTraining, position: Position) -> Position:
    """Evaluate on val after an epoch, record both, and save a checkpoint. Returns the start of the next epoch."""
    info, stage, bad_images = run.info, training.stage, run.source.bad_images
    trained = training.meter.total()
    bad_images.refuse_none_usable(trained.count, "train", run.source.index("train"))
    info.phase = f"the evaluation after epoch {position.epoch + 1} of stage {stage.name}"
    began = time.monotonic()
    # With mistakes, so that the best epoch needs no second evaluation. Where a part trains, that comes at the end.
    in_full = isinstance(training.inner, ImageNetwork)
    with training.weights.evaluated():
        result = evaluate(
            info, training.inner, training.batches.val_sampler.turns, training.batches.evaluation(), run.num_classes,
            part_size=training.val_part_size, agreement=run.agreement, mistakes=MISTAKES if in_full else None,
        )  # fmt: skip
    bad_images.refuse_none_usable(result.metrics.count, "val", run.source.index("val"))
    line, moment = run.records.add_epoch(training.moment(position), trained), training.moment(position)
    seconds = time.monotonic() - began
    is_last = run.is_last(stage, position.epoch)
    is_best = run.records.add_evaluation(moment, result.metrics, seconds, result.waited, is_last=is_last)
    preferred = run.records.prefers_last(stage.name, stage.config.epochs)
    training.weights.offer(run.state.final, stage.metric, preferred=preferred)
    if is_best:
        run.best_evaluation = result if in_full else None
    record = run.state.stages[stage.name]
    record.peak_memory_mb = max(record.peak_memory_mb, max_over_ranks(info, peak_memory_mb(info)))
    run.stop_early(stage)
    console.print_epoch(info, training, run.state, line, run.config.stages, line["seconds"] + seconds)
    run.state.position = following = Position(stage.name, position.epoch + 1, 0, position.step)
    training.meter = Meter(info, run.num_classes)
    run.save(training, is_best=is_best)
    return following


if __name__ == "__main__":
    exit_process(main())
