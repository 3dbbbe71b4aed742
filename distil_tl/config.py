"""The configuration: the sections of all folders composed, loaded from YAML and the command line, and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distil_tl.data.config import (
    DataConfig,
    data_name,
    evaluation_problems,
    fitting_world_sizes,
    root_problems,
)
from distil_tl.distributed.config import DistributedConfig, cuda_is_available
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.rundir.changes import is_free_on_resume, new_keys
from distil_tl.rundir.config import CheckpointConfig
from distil_tl.tracking.config import TrackingConfig
from distil_tl.training.config import (
    COMPILE,
    COMPILE_MODES,
    METRICS,
    PRECISIONS,
    OptimConfig,
    StageConfig,
    compiler_problem,
    default_stages,
    wants_features,
)
from distil_tl.utils.args import (
    apply,
    flatten,
    is_file,
    parse_overrides,
    read_yaml,
    refuse,
    refuse_spaces,
    to_object,
)
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import expand_home, home_problems
from distil_tl.utils.log import logger
from distil_tl.utils.paths import impossible_paths


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: dict[str, StageConfig] = field(default_factory=default_stages)
    optim: OptimConfig = field(default_factory=OptimConfig)
    metric: str = "top1"  # chooses the best epoch and head: top1 | top5 | macro_f1 | balanced_accuracy | loss
    precision: str = "auto"  # auto (chosen by a trial in long stages) | fp32 | bf16 | fp16
    compile: str = "none"  # torch.compile, which takes about a minute: none | prefix (the frozen part) | all
    compile_mode: str = "default"  # of torch.compile: default | reduce-overhead (CUDA graphs) | max-autotune
    tf32: bool = True  # on CUDA, round float32 convolutions to TF32, which is faster; matrix products never are
    deterministic: bool = False  # on CUDA, use only algorithms that repeat bit by bit; slower
    seed: int = 0  # of the new head, the order of the images and the augmentations
    run_dir: str | None = None  # null: runs/DATA-MODEL-HASH, so that the same command resumes its run
    resume: str = "auto"  # auto: from the last checkpoint in run_dir | never | the path of a run or checkpoint
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


MAX_INTEGER = 2**53  # what floats and JSON keep exactly; counters of 64 bits overflow later
PATHS = ("data.root", "data.labels", "data.stage_to", "run_dir", "resume", "model.weights")
# Defaults of the demo, when no data is given: 8x8 digits, which are not to be mirrored or cropped.
DEMO: dict[str, Any] = {"data": {"image_size": 64, "augment": "none", "hflip": False}}


def load(args: Sequence[str], *, saved: bool = False, unread: list[str] | None = None) -> tuple[Config, DictConfig]:
    """The configuration of the arguments `[CONFIG.yaml] [key=value ...]`.

    Dataclass defaults, then the YAML file (over its `base:`), then `key=value`.

    Args:
        saved: the YAML file is the config.yaml of a run. Keys newer than that run get the value for the old behaviour.
        unread: gets the problems of keys and values that can't be read, which are left out; None: they are an error.

    Returns:
        The configuration, and the same with interpolations such as `${oc.env:USER}` unresolved, to be written to disk.

    Raises:
        UserError: unknown keys (with suggestions), values of the wrong type, files that can't be read: all together.
    """
    refuse_spaces(args)
    files = [arg for arg in args if is_file(arg)]
    if len(files) > 1 or any(file.startswith("-") for file in files):
        odd = next((file for file in files if file.startswith("-")), files[-1])
        raise UserError(f"can't read the argument {odd!r}; usage: [CONFIG.yaml] [key=value ...]")
    problems: list[str] = []
    tree = read_yaml(Path(files[0])) if files else {}
    tree.pop("slurm", None)  # for launch, which reads the same files
    schema = OmegaConf.structured(Config)
    overrides = parse_overrides(schema, [arg for arg in args if not is_file(arg)], problems)
    given_stages = flatten(tree.get("stages"))
    if "stages" in tree:
        _define_stages(schema, tree.pop("stages"), problems)
    named = flatten(tree.get("data")) | flatten(overrides.get("data"))
    if files and not named.keys() & {"root", "labels"}:
        problems.append(f"{files[0]} names no images: add data.root=FOLDER (data.root=null is the embedded digits)")
    if not files and named.get("root") is None and named.get("labels") is None:
        apply(schema, DEMO, "", problems)
    apply(schema, tree, "", problems)
    apply(schema, overrides, "", problems)
    if unread is not None:
        unread += problems
    elif problems:
        with suppress(UserError):  # an interpolation that can't be resolved
            problems += values_out_of_range(_to_config(schema), without_model=True)  # which would import torch
        refuse(problems)
    config = _to_config(schema)
    given = flatten(tree).keys() | flatten(overrides).keys() | {f"stages.{key}" for key in given_stages}
    older = Path(files[0]) if saved else _saved_configuration(config)
    if older is not None and new_keys(config.stages):
        known = flatten(read_yaml(older)).keys()
        for key, before in new_keys(config.stages).items():
            if key not in known and key not in given:
                OmegaConf.update(schema, key, before)
        config = _to_config(schema)
    _resolve_defaults(config, schema)
    return config, schema


def load_saved(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run directory, with `key=value` overrides. Raises as `load` does."""
    return load([str(run_dir / "config.yaml"), *overrides], saved=True)[0]


def _saved_configuration(config: Config) -> Path | None:
    """The config.yaml of the run that this one resumes, if there is one."""
    found = [config.run_dir] if config.run_dir is not None else []
    if config.resume not in ("auto", "never"):  # a run directory, or RUN_DIR/checkpoints/STEP
        found += [config.resume, str(Path(config.resume).parent.parent)]
    paths = [expand_home(folder) / "config.yaml" for folder in found]
    return next((path for path in paths if path.is_file() and config.resume != "never"), None)


def _to_config(schema: DictConfig) -> Config:
    config: Config = to_object(schema)
    refuse(list(impossible_paths(flatten(dataclasses.asdict(config)), PATHS)))
    return config


def _define_stages(schema: DictConfig, stages: Any, problems: list[str]) -> None:
    """Replace the default stages by those of a file, in its order."""
    if not isinstance(stages, dict) or not stages:
        problems.append("`stages` must hold at least one named stage, as in `stages: {head: {unfreeze: head}}`")
        return
    schema.stages = {}
    for name, values in stages.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            problems.append(
                f"the stage name {name!r} is not valid: use letters, digits, _ and -, starting with a letter"
            )
            continue
        schema.stages[name] = StageConfig()
        if not isinstance(values, dict) or "unfreeze" not in values:
            problems.append(f"stages.{name} must say what it trains, as in `unfreeze: head` or `unfreeze: all`")
        if isinstance(values, dict):
            apply(schema, {"stages": {name: values}}, "", problems)


def _resolve_defaults(config: Config, schema: DictConfig) -> None:
    """Fill in defaults that depend on other values, so that the saved file holds what was used."""
    if config.model.weights == "auto" and not config.model.problems():
        config.model.weights = schema.model.weights = resolve_weights(config.model)
    for section, key in ((config.data, "root"), (config.data, "labels"), (config, "run_dir"), (config, "resume")):
        path = getattr(section, key)
        if path is not None and path.startswith("~"):
            setattr(section, key, str(expand_home(path)))
    if config.data.labels is not None and config.data.root is None:
        config.data.root = schema.data.root = str(Path(config.data.labels).parent)
    if config.run_dir is None:
        config.run_dir = schema.run_dir = f"runs/{run_name(config)}"


def run_name(config: Config) -> str:
    """A name that is the same for the same training: data, model, and a hash of everything that affects the result."""
    values = flatten(dataclasses.asdict(config))
    unset = {key for key, before in new_keys(config.stages).items() if values.get(key) == before}
    hashed = {key: value for key, value in values.items() if not is_free_on_resume(key) and key not in unset}
    if config.data.labels is not None:
        hashed["data.labels"] = str(Path(config.data.labels).resolve())
    hashed["data.root"] = str(Path(config.data.root).resolve()) if config.data.root else None
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True, default=str).encode()).hexdigest()[:8]
    data = data_name(Path(config.data.root)) if config.data.root else "digits"
    return f"{data}-{config.model.name.rpartition('/')[2]}-{digest}"


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
    if batch >= 1 and batch % world_size:
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
    found = [] if without_model else config.model.problems()
    found += _section_problems(config)
    yield from found
    paths = {
        "data.root": config.data.root,
        "data.labels": config.data.labels,
        "data.stage_to": config.data.stage_to,
        "model.weights": config.model.weights,
    }
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


def _section_problems(config: Config) -> Iterator[str]:
    yield from config.data.problems()
    for name, stage in config.stages.items():
        yield from stage.problems(name)
        searched = stage.search.wanted and stage.epochs > 0
        if searched and not wants_features(stage, stage.augment or config.data.augment):
            yield (
                f"stages.{name}.search needs a stage that trains on features: set unfreeze=head, and features=on or "
                f"views=N where images are augmented; or remove the search"
            )
        if searched and stage.search.prefer == "regularized" and config.metric == "loss":
            yield (
                f"stages.{name}.search.prefer=regularized compares shares of images, and metric=loss is none; choose "
                f"another metric, or prefer=best"
            )
    yield from config.optim.problems()
    yield from config.checkpoint.problems()
    yield from config.distributed.problems()
    yield from config.tracking.problems()
    if all(stage.epochs == 0 for stage in config.stages.values()):
        yield "every stage has 0 epochs, so there is nothing to train; set stages.NAME.epochs"
    choices = {"metric": METRICS, "precision": PRECISIONS, "compile": COMPILE, "compile_mode": COMPILE_MODES}
    for key, known in choices.items():
        if (value := getattr(config, key)) not in known:
            yield f"{key} is {value!r}; choose one of {', '.join(known)}"


def hints(config: Config) -> Iterator[str]:
    """Values that have no effect, where somebody may expect one."""
    if config.compile_mode != "default" and config.compile == "none":
        yield f"compile_mode={config.compile_mode} has no effect with compile=none; set compile=prefix or compile=all"
