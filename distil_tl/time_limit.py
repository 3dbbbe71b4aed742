"""`max_minutes`: as many epochs as the time permits, from the measured speed of each stage."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distil_tl.auto_settings import warn_if_nothing_is_mixed
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.run import Run
from distil_tl.training.evaluation import evaluate
from distil_tl.training.interpolation import ALPHAS
from distil_tl.training.optim import lr_factor, set_lr
from distil_tl.training.stage import Stage
from distil_tl.training.step import StageTraining, average_statistics, optimizer_step
from distil_tl.utils.log import duration, logger

WARM_STEPS, STEPS = 3, 12  # not measured, as they include starting to load; and measured
TURNS = 4  # batches of a measured evaluation
MARGIN = 0.95  # share of the time that is planned: checkpoints and the end of the run need some

Step = Callable[[DistInfo, StageTraining, int], Tensor]


def affordable_epochs(seconds: float, per_epoch: float, epochs: Mapping[str, int], stage: str) -> int:
    """The epochs of a stage that begins when `seconds` are left: at least 1, at most those configured.

    The time is shared with the later stages by their epochs, as if an epoch of each took as long. What a stage does
    not need is left to them.

    Args:
        per_epoch: seconds of training and evaluation.
        epochs: as configured, of this stage and the later ones.
    """
    share = epochs[stage] / sum(epochs.values())
    return max(1, min(epochs[stage], int(seconds * share / per_epoch)))


def limit_epochs(run: Run, stage: Stage, begin: Callable[[], StageTraining], take_step: Step) -> Stage:
    """The stage with as many epochs as its share of the time permits. A collective; rank 0 decides.

    A few steps are measured and then undone, so that the run is the same as one with this number of epochs.

    Args:
        begin: builds the training of the stage.
        take_step: forward and backward passes of a step.
    """
    name, stages = stage.name, run.config.stages
    names = list(stages)
    epochs = {each: int(stages[each].epochs) for each in names[names.index(name) :]}
    run.info.phase = f"measuring the speed of stage {name}"
    seconds = measure(run, begin(), take_step)

    def decide() -> dict[str, Any]:
        run.tick()
        ends = 1 + (len(ALPHAS) - 1) * stage.config.wise_ft  # evaluations after the last epoch
        left = MARGIN * 60 * (run.config.max_minutes or 0) - run.state.seconds - ends * seconds["evaluation"]
        chosen = affordable_epochs(left, seconds["training"] + seconds["evaluation"], epochs, name)
        return {"epochs": chosen, "configured": epochs[name], "seconds_left": left, "seconds_of_epoch": seconds}

    limit = on_rank_zero(run.info, f"the number of epochs of stage {name}", decide)
    logger.info(
        "%s: %d of %d epochs fit into max_minutes=%g (%.1f s each, %s left for this and later stages)", name,
        limit["epochs"], epochs[name], run.config.max_minutes, sum(limit["seconds_of_epoch"].values()),
        duration(max(0.0, limit["seconds_left"])),
    )  # fmt: skip
    config = dataclasses.replace(stages[name], epochs=limit["epochs"])
    warn_if_nothing_is_mixed(name, config)
    run.config = dataclasses.replace(run.config, stages={**stages, name: config})
    run.state.resolved[f"stages.{name}.epochs"] = limit["epochs"]
    run.state.stages[name].limit = limit
    return dataclasses.replace(stage, config=dataclasses.replace(stage.config, epochs=limit["epochs"]))


def measure(run: Run, training: StageTraining, take_step: Step) -> dict[str, float]:
    """Seconds of the training and of the evaluation of an epoch, by the first steps. The weights are as before."""
    info, batches, optim = run.info, training.batches, training.stage.optim
    module = run.model.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batches.start(0, 0)
    count = min(WARM_STEPS + STEPS, training.total_steps)
    warm, began = min(WARM_STEPS, count - 1), 0.0
    for step in range(count):
        if step == warm:
            began = _now(info)
        set_lr(training.optimizer, lr_factor(step, training.total_steps, optim.warmup, optim.schedule))
        loss = take_step(info, training, step)
        optimizer_step(training, loss, step)
        average_statistics(info, training)
    of_step = (_now(info) - began) / (count - warm)
    turns = batches.val_sampler.turns
    began = _now(info)
    evaluate(
        info, training.inner, min(turns, TURNS), batches.evaluation(), run.num_classes,
        part_size=training.val_part_size, agreement=run.agreement,
    )  # fmt: skip
    evaluation = (_now(info) - began) * turns / max(1, min(turns, TURNS))
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(before[name])
    return {"training": of_step * training.sampler.steps_per_epoch, "evaluation": evaluation}


def _now(info: DistInfo) -> float:
    """The time, monotonic seconds, when the device has done its work."""
    if info.device.type == "cuda":
        torch.cuda.synchronize(info.device)
    return time.monotonic()
