"""Checks of the configuration, and hints at values that have no effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from distil_tl.config.compiler import compiler_problem
from distil_tl.config.sections import Config
from distil_tl.data.augmentation import Augment, augment_text
from distil_tl.data.config import (
    DataConfig,
    evaluation_problems,
    fitting_world_sizes,
    root_problems,
)
from distil_tl.distributed.config import cuda_is_available
from distil_tl.models.config import ModelConfig
from distil_tl.models.names import BUILT_HEADS
from distil_tl.training.config import (
    COMPILE,
    COMPILE_MODES,
    METRICS,
    PRECISIONS,
    StageConfig,
    wants_features,
)
from distil_tl.training.heads.config import FITTED_HEADS, balance_problem, network_head, network_head_problems
from distil_tl.utils.args import (
    flatten,
    refuse,
)
from distil_tl.utils.home import home_problems
from distil_tl.utils.log import logger

RECIPES = ("quick", "standard", "best")  # files in configs/recipes
MAX_INTEGER = 2**53  # what floats and JSON keep exactly; counters of 64 bits overflow later


def check(config: Config, world_size: int) -> None:
    """Check the configuration before any process group, download or GPU work. What has no effect is a warning.

    Raises:
        UserError: lists all problems.
    """
    refuse(list(problems(config, world_size)))
    for hint in hints(config):
        logger.warning("%s", hint)


def check_evaluation(config: Config) -> None:
    """`check`, for the sections that an evaluation uses."""
    found = [*config.data.problems(), *config.distributed.problems()]
    if config.precision not in PRECISIONS:
        found.append(f"precision is {config.precision!r}; choose one of {', '.join(PRECISIONS)}")
    refuse([*found, *evaluation_problems(config.data)])


def problems(config: Config, world_size: int) -> Iterator[str]:
    """One message for each problem, with its solution."""
    yield from values_out_of_range(config)
    batch = config.data.global_batch_size
    if type(batch) is int and batch >= 1 and batch % world_size:
        fit = [str(n) for n in fitting_world_sizes(batch) if n <= 4 * world_size]
        larger = -(-batch // world_size) * world_size
        yield (
            f"data.global_batch_size={batch} can't be divided evenly among {world_size} processes; world sizes that "
            f"fit are {', '.join(fit)}, or use data.global_batch_size={larger}"
        )
    device = config.distributed.device
    if config.compile in COMPILE and (problem := compiler_problem(config.compile, device, cuda_is_available)):
        yield problem
    yield from root_problems(config.data, config.run_dir)
    elsewhere = config.resume not in ("auto", "never") and not config.resume.startswith("~")  # else named above
    if elsewhere and not Path(config.resume).exists():
        yield f"resume={config.resume} does not exist; give auto, never, or the path of a run or checkpoint"


def values_out_of_range(config: Config, *, without_model: bool = False) -> Iterator[str]:
    """The problems of single values, and of values that contradict each other."""
    found = [] if without_model else [*config.model.problems(), *_teacher_models(config)]
    found += _section_problems(config)
    yield from found
    paths = {
        "data.root": config.data.root,
        "data.labels": config.data.labels,
        "data.stage_to": config.data.stage_to,
        "model.weights": config.model.weights,
    }
    paths |= {f"stages.{name}.distill.teacher": stage.distill.teacher for name, stage in config.stages.items()}
    yield from home_problems({**paths, "run_dir": config.run_dir, "resume": config.resume})
    for key, value in flatten(dataclasses.asdict(config)).items():
        if any(problem.startswith(key) for problem in found):
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                yield f"{key} is {one}; give a finite number"
            if isinstance(one, int) and abs(one) > MAX_INTEGER and key != "seed":
                yield f"{key} is {one}, too large a number"
            if isinstance(one, str) and not one.strip():
                yield f"{key} is empty; give a value, or null"


def _teacher_models(config: Config) -> Iterator[str]:
    """Names of networks that no library has, of teachers that are weights."""
    for name, stage in config.stages.items():
        if stage.distill.model is not None:
            for problem in ModelConfig(stage.distill.model).name_problems():
                yield problem.replace("model.name", f"stages.{name}.distill.model", 1)


def _unfit_for_features(key: str, stage: StageConfig, augment: Augment) -> Iterator[str]:
    """A message for a stage that fits its head, and does not train it on features."""
    wanted = []
    if not stage.trains_head:
        wanted.append(f"{key}.unfreeze=head")
    if not wants_features(dataclasses.replace(stage, unfreeze="head"), augment):
        wanted.append(f"{key}.features=on" + ("" if augment == "none" else f" (or {key}.augment=none)"))
    if wanted:
        yield f"{key}.head={stage.head} is fitted to features: set {' and '.join(wanted)}, or use {key}.head=linear"


def _section_problems(config: Config) -> Iterator[str]:
    yield from config.data.problems()
    for name, stage in config.stages.items():
        yield from stage.problems(name, hflip=config.data.hflip)
        searched = stage.search.wanted and stage.epochs != 0 and not stage.mixes
        if searched and not wants_features(stage, config.augment_of(stage)):
            yield (
                f"stages.{name}.search needs a stage that trains on features: set unfreeze=head, and augment=none, "
                f"features=on or views=N where images are augmented; or remove the search"
            )
        is_other = stage.head in BUILT_HEADS and stage.head != network_head(config.stages)  # which is refused below
        if stage.head in FITTED_HEADS and stage.epochs != 0 and not stage.mixes and not is_other:
            yield from _unfit_for_features(f"stages.{name}", stage, config.augment_of(stage))
        if stage.epochs != 0 and (problem := balance_problem(f"stages.{name}.head", [stage.head], config.data.balance)):
            yield problem
        if searched and stage.search.prefer == "regularized" and config.metric == "loss":
            yield (
                f"stages.{name}.search.prefer=regularized compares shares of images, and metric=loss is none; choose "
                f"another metric, or prefer=best"
            )
    yield from network_head_problems(config.stages)
    yield from config.optim.problems()
    yield from config.checkpoint.problems()
    yield from config.distributed.problems()
    yield from config.tracking.problems()
    if all(stage.epochs == 0 for stage in config.stages.values()):
        yield "every stage has 0 epochs, so there is nothing to train; set stages.NAME.epochs"
    if config.recipe is not None and config.recipe not in RECIPES:
        yield f"recipe is {config.recipe!r}; choose one of {', '.join(RECIPES)}, or null"
    if config.max_minutes is not None and not config.max_minutes > 0:
        yield "max_minutes must be above 0, or null for no limit"
    choices = {"metric": METRICS, "precision": PRECISIONS, "compile": COMPILE, "compile_mode": COMPILE_MODES}
    for key, known in choices.items():
        if (value := getattr(config, key)) not in known:
            yield f"{key} is {value!r}; choose one of {', '.join(known)}"


def hints(config: Config) -> Iterator[str]:
    """Values that have no effect, where somebody may expect one."""
    if config.compile_mode != "default" and config.compile == "none":
        yield f"compile_mode={config.compile_mode} has no effect with compile=none; set compile=prefix or compile=all"
    for name, stage in config.stages.items():
        if stage.epochs != 0 and (stage.views or 1) > 1 and config.augment_of(stage) == "none":
            yield (
                f"stages.{name}.views={stage.views} has no effect, as nothing is augmented and all views are equal; "
                f"set stages.{name}.augment, as to light"
            )
    if config.data.augment not in ("none", DataConfig().augment) and not config.uses_data_augment:
        yield (
            f"data.augment={augment_text(config.data.augment)} has no effect, as each stage that is trained has an "
            f"augmentation of its own; set stages.NAME.augment"
        )
