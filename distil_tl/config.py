"""The whole configuration: dataclasses of the rooms composed, read from YAML and the command line, and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distil_tl.data.config import DataConfig, archive_problem, data_name, fitting_world_sizes
from distil_tl.distributed.config import DistributedConfig
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.rundir.checkpoint import CheckpointConfig
from distil_tl.tracking.config import TrackingConfig
from distil_tl.training.optim import OptimConfig
from distil_tl.training.precision import COMPILE, PRECISIONS
from distil_tl.training.stage import StageConfig, default_stages, wants_features
from distil_tl.utils.args import apply, flatten, is_file, parse_overrides, plain, read_yaml, refuse, to_object
from distil_tl.utils.errors import UserError, did_you_mean


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: dict[str, StageConfig] = field(default_factory=default_stages)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: str = "auto"  # auto | fp32 | bf16 | fp16; auto: what a trial finds to be faster, in long stages
    compile: str = "none"  # by torch.compile, a minute or so at the start: none | prefix, the frozen part | all
    seed: int = 0  # of the new head, the order and the augmentations
    run_dir: str | None = None  # null: runs/DATA-MODEL-HASH, so that the same command finds its run again
    resume: str = "auto"  # auto: go on where run_dir is | never | the path of a run or checkpoint to go on from
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


# What the embedded demo sets when no data is named: 8x8 digits, which a mirror image or a close crop would spoil.
DEMO: dict[str, Any] = {"data": {"image_size": 64, "augment": "none", "hflip": False}}

# Keys that change how a run proceeds but not what it computes: free to differ when a run is resumed.
FREE_ON_RESUME = (
    "run_dir",
    "resume",
    "data.root",  # a moved folder is the same data; the index's fingerprint says whether it is
    "data.stage_to",
    "data.workers",
    "data.on_bad_image",  # where nothing was bad it changed nothing, and where something was, `error` ended the run
    "data.max_local_batch_size",
    "checkpoint.",
    "distributed.",
    "tracking.",
)


def load(args: Sequence[str]) -> tuple[Config, DictConfig]:
    """The configuration that `[CONFIG.yaml] [key=value ...]` means.

    Dataclass defaults, then the YAML file (after its `base:`), then `key=value`. The second result is the same
    as OmegaConf has it, with interpolations such as `${oc.env:USER}` unresolved: what may be written to disk.

    Raises:
        UserError: unknown keys (with suggestions), values of the wrong type, files that can't be read: all of them.
    """
    files = [arg for arg in args if is_file(arg)]
    if len(files) > 1 or any(file.startswith("-") for file in files):
        odd = next((file for file in files if file.startswith("-")), files[-1])
        raise UserError(f"can't read the argument {odd!r}; usage: [CONFIG.yaml] [key=value ...]")
    problems: list[str] = []
    tree = read_yaml(Path(files[0]), ()) if files else {}
    tree.pop("slurm", None)  # is for launch, which reads the same files
    schema = OmegaConf.structured(Config)
    overrides = parse_overrides(schema, [arg for arg in args if not is_file(arg)], problems)
    if "stages" in tree:
        _define_stages(schema, tree.pop("stages"), problems)
    named = flatten(tree.get("data")) | flatten(overrides.get("data"))
    if files and "root" not in named:
        problems.append(f"{files[0]} names no images: add data.root=FOLDER (data.root=null is the embedded digits)")
    if not files and named.get("root") is None:
        apply(schema, DEMO, "", problems)
    apply(schema, tree, "", problems)
    apply(schema, overrides, "", problems)
    refuse(problems)
    config = to_object(schema)
    assert isinstance(config, Config)
    _settle(config, schema)
    return config, schema


def _define_stages(schema: DictConfig, stages: Any, problems: list[str]) -> None:
    """A file's stages in place of the default ones, in the file's order."""
    if not isinstance(stages, dict) or not stages:
        problems.append("`stages` must hold at least one named stage, as in `stages: {head: {unfreeze: head}}`")
        return
    schema.stages = {}
    for name, values in stages.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            problems.append(f"the stage name {name!r} may have letters, digits, _ and -, and begins with a letter")
            continue
        schema.stages[name] = StageConfig()
        if not isinstance(values, dict) or "unfreeze" not in values:
            problems.append(f"stages.{name} must say what it trains, as in `unfreeze: head` or `unfreeze: all`")
        if isinstance(values, dict):
            apply(schema, {"stages": {name: values}}, "", problems)


def _settle(config: Config, schema: DictConfig) -> None:
    """Fill in what follows from other values, so that the saved file says what was used."""
    if config.model.weights == "auto" and not config.model.problems():
        config.model.weights = schema.model.weights = resolve_weights(config.model)
    for section, key in ((config.data, "root"), (config, "run_dir"), (config, "resume")):
        path = getattr(section, key)
        if path is not None and path.startswith("~"):
            setattr(section, key, str(Path(path).expanduser()))
    if config.run_dir is None:
        config.run_dir = schema.run_dir = f"runs/{run_name(config)}"


def run_name(config: Config) -> str:
    """A name that is the same for the same training: data, model, and a hash of all that affects the result."""
    matter = {k: v for k, v in flatten(dataclasses.asdict(config)).items() if not _is_free(k)}
    matter["data.root"] = str(Path(config.data.root).resolve()) if config.data.root else None
    digest = hashlib.sha256(json.dumps(matter, sort_keys=True, default=str).encode()).hexdigest()[:8]
    data = data_name(Path(config.data.root)) if config.data.root else "digits"
    return f"{data}-{config.model.name.rpartition('/')[2]}-{digest}"


def _is_free(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_ON_RESUME)


def unsafe_changes(
    saved: dict[str, Any],
    now: dict[str, Any],
    started: Sequence[str],
    digests: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> list[str]:
    """What differs between two configurations (nested dicts) and can't, in a run that has begun the stages `started`.

    A stage that has not begun may still change. `digests` are those of `interpolated`, of both.
    """
    before, after = flatten(saved), flatten(now)
    changes = []
    for key in sorted(before.keys() | after.keys()):
        parts = key.split(".")
        to_come = parts[0] == "stages" and len(parts) > 1 and parts[1] not in started
        if _is_free(key) or to_come:
            continue
        if before.get(key) != after.get(key):
            changes.append(f"{key}: was {before.get(key)!r}, now {after.get(key)!r}")
        elif key in digests[0] and digests[0][key] != digests[1].get(key):
            changes.append(f"{key}: {after[key]} stands for another value than it did")
    stages = now.get("stages") or {}
    left = [name for name in started if name in stages]
    ahead = [name for name, stage in stages.items() if name in left or stage.get("epochs") != 0]
    if ahead[: len(left)] != left:
        changes.append(f"stages: {', '.join(started)} came first, now the order is {', '.join(ahead)}")
    return changes


def interpolated(config: Config, source: DictConfig) -> dict[str, str]:
    """Digests of the values behind interpolations, such as `${oc.env:SEED}`, by key: to compare, not to read."""
    values = flatten(dataclasses.asdict(config))
    found = {}
    for key, text in flatten(plain(source)).items():
        if isinstance(text, str) and "${" in text and not _is_free(key):
            found[key] = hashlib.sha256(f"{key}={values[key]!r}".encode()).hexdigest()[:16]
    return found


def check(config: Config, world_size: int) -> None:
    """Refuse what can't work, all of it together, before any process group, download or GPU work.

    Raises:
        UserError: listing every problem.
    """
    refuse(list(problems(config, world_size)))


def check_evaluation(config: Config) -> None:
    """As `check`, of what an evaluation uses."""
    found = [*config.data.problems(), *config.distributed.problems()]
    if config.precision not in PRECISIONS:
        found.append(f"precision is {config.precision!r}; choose one of {', '.join(PRECISIONS)}")
    if config.data.root is not None and not Path(config.data.root).is_dir():
        tar = "; unpack it and give the folder" if Path(config.data.root).is_file() else ""
        found.append(f"data.root={config.data.root} is not a folder{tar}")
    refuse(found)


def problems(config: Config, world_size: int) -> Iterator[str]:
    """What can't work, each with the way out."""
    yield from config.data.problems()
    yield from config.model.problems()
    for name, stage in config.stages.items():
        yield from stage.problems(name)
        sought = stage.search.wanted and stage.epochs > 0
        if sought and not wants_features(stage, stage.augment or config.data.augment):
            yield (
                f"stages.{name}.search needs a stage that trains on features: give it unfreeze=head, and where images "
                f"are augmented features=on or views=N; or leave the search out"
            )
    yield from config.optim.problems()
    yield from config.checkpoint.problems()
    yield from config.distributed.problems()
    yield from config.tracking.problems()
    if all(stage.epochs == 0 for stage in config.stages.values()):
        yield "every stage has 0 epochs, so there is nothing to train; set stages.NAME.epochs"
    if config.precision not in PRECISIONS:
        yield f"precision is {config.precision!r}; choose one of {', '.join(PRECISIONS)}"
    if config.compile not in COMPILE:
        yield f"compile is {config.compile!r}; choose one of {', '.join(COMPILE)}"
    batch = config.data.global_batch_size
    if batch >= 1 and batch % world_size:
        fit = [str(n) for n in fitting_world_sizes(batch) if n <= 4 * world_size]
        larger = -(-batch // world_size) * world_size
        yield (
            f"data.global_batch_size={batch} can't be dealt out evenly to {world_size} processes; world sizes that "
            f"fit are {', '.join(fit)}, or use data.global_batch_size={larger}"
        )
    if config.data.root is not None:
        yield from _root_problems(Path(config.data.root), config.data.stage_to)
    if config.resume not in ("auto", "never") and not Path(config.resume).exists():
        yield f"resume={config.resume} does not exist; give auto, never, or the path of a run or checkpoint"


def _root_problems(root: Path, stage_to: str | None) -> Iterator[str]:
    if root.is_file():
        if problem := archive_problem(root, stage_to):
            yield problem
        return
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else [])
        yield f"data.root={root} is not a folder{near}"
        return
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:5]) or "none"
        yield (
            f"data.root={root} has no {' and no '.join(missing)} folder; it must hold train/CLASS/*.jpg and "
            f"val/CLASS/*.jpg (its folders: {have})"
        )


def usage(program: str) -> str:
    """Every key with its default and the comment beside it in the code."""
    lines = [f"usage: {program} [CONFIG.yaml] [key=value ...]", "", "Keys, their defaults and meanings:", ""]
    lines += explain(Config(), "")
    return "\n".join(lines) + "\n"


def explain(section: Any, prefix: str) -> list[str]:
    """A line for each field of a dataclass: its key behind `prefix`, its default, and the comment beside it."""
    source = inspect.getsource(type(section))
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.MULTILINE))
    lines = []
    for item in dataclasses.fields(section):
        value, key = getattr(section, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            lines += explain(value, f"{key}.")
        elif item.name == "stages":
            lines += [line for name, stage in value.items() for line in explain(stage, f"{key}.{name}.")]
        else:
            shown = "null" if value is None else value
            lines.append(f"  {f'{key}={shown}':<46} {comments.get(item.name, '')}".rstrip())
    return lines
