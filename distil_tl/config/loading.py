"""The configuration loaded: defaults, a YAML file, and `key=value` arguments."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distil_tl.config.checks import RECIPES, values_out_of_range
from distil_tl.config.sections import Config
from distil_tl.data.config import (
    data_name,
)
from distil_tl.models.config import resolve_weights
from distil_tl.models.names import OWN_SEPARATOR, OWN_VARIABLE
from distil_tl.rundir.changes import earlier_defaults, is_free_on_resume, new_keys
from distil_tl.training.config import (
    StageConfig,
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
from distil_tl.utils.home import expand_home
from distil_tl.utils.paths import impossible_paths
from distil_tl.utils.shipped import shipped_files

PATHS = ("data.root", "data.labels", "data.stage_to", "run_dir", "resume", "model.weights")
# Defaults of the demo, when no data is given: 8x8 digits, which are not to be mirrored or cropped.
DEMO: dict[str, Any] = {"data": {"image_size": 64, "augment": "none", "hflip": False}}


def load(
    args: Sequence[str], *, saved: bool = False, allow_own: bool = False, unread: list[str] | None = None
) -> tuple[Config, DictConfig]:
    """The configuration of the arguments `[CONFIG.yaml] [key=value ...]`.

    Dataclass defaults, then the file of `recipe`, then the YAML file (over its `base:`), then `key=value`.

    Args:
        saved: the YAML file is the config.yaml of a run. Keys newer than that run get the value for the old behaviour.
        allow_own: whether a saved configuration may name a network of its author, whose code would be run.
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
    schema = copy.deepcopy(_defaults())
    overrides = parse_overrides(schema, [arg for arg in args if not is_file(arg)], problems)
    recipe = {} if saved else _read_recipe(overrides.get("recipe", tree.get("recipe")))
    given = flatten(tree).keys() | flatten(overrides).keys()  # a recipe may be newer than a run that is resumed
    tree = {**({"stages": recipe["stages"]} if "stages" in recipe else {}), **tree}
    if "stages" in tree:
        _define_stages(schema, tree.pop("stages"), problems)
    apply(schema, {key: value for key, value in recipe.items() if key != "stages"}, "", problems)
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
    if saved and not allow_own:
        _refuse_saved_code(config, flatten(overrides))
    older = Path(files[0]) if saved else _saved_configuration(config)
    if older is not None and new_keys(config.stages):
        _keep_older_values(config, schema, older, given)
        config = _to_config(schema)
    _resolve_defaults(config, schema)
    return config, schema


@functools.cache
def _defaults() -> DictConfig:
    """The schema with all defaults, to be copied: to make it takes longer than all else that `load` does."""
    return OmegaConf.structured(Config)  # type: ignore[no-any-return]


def load_saved(run_dir: Path, overrides: Sequence[str] = (), *, allow_own: bool = False) -> Config:
    """The configuration of a run directory, with `key=value` overrides. Raises as `load` does."""
    return load([str(run_dir / "config.yaml"), *overrides], saved=True, allow_own=allow_own)[0]


def _refuse_saved_code(config: Config, given: Collection[str]) -> None:
    """Raises UserError if a saved configuration names code to import that the caller has not named.

    Someone else may have written it, and the code beside it.

    Args:
        given: the keys of the arguments.
    """
    names = {"model.name": config.model.name}
    names |= {f"stages.{stage}.distill.model": each.distill.model or "" for stage, each in config.stages.items()}
    for key, name in names.items():
        if OWN_SEPARATOR in name and key not in given and os.environ.get(OWN_VARIABLE) != "1":
            raise UserError(
                f"{key}={name} of the saved configuration names code that would be imported and run. If you trust its "
                f"author, set {OWN_VARIABLE}=1, repeat {key}={name} where the command takes key=value, or call "
                f"distil_tl.load(..., allow_own=True)"
            )


def _keep_older_values(config: Config, schema: DictConfig, older: Path, given: Collection[str]) -> None:
    """Set keys that are newer than a saved configuration, or whose default has changed since, as that run had them."""
    known = flatten(read_yaml(older))
    for key, before in new_keys(config.stages).items():
        if key not in known and key not in given:
            OmegaConf.update(schema, key, before)
    for key, before in earlier_defaults(known, given).items():
        if not key.startswith("stages.") or key.split(".")[1] in config.stages:
            OmegaConf.update(schema, key, before)


def _read_recipe(name: Any) -> dict[str, Any]:
    """The keys that a recipe sets; none for a name that is refused later."""
    return read_yaml(shipped_files()[name]) if name in RECIPES else {}


def _saved_configuration(config: Config) -> Path | None:
    """The config.yaml of the run that this one resumes, if there is one."""
    found = [config.run_dir] if config.run_dir is not None else []
    if config.resume not in ("auto", "never"):  # a run directory, or RUN_DIR/checkpoints/STEP
        found += [config.resume, str(Path(config.resume).parent.parent)]
    paths = [expand_home(folder) / "config.yaml" for folder in found]
    return next((path for path in paths if path.is_file() and config.resume != "never"), None)


def _to_config(schema: DictConfig) -> Config:
    config: Config = to_object(schema)
    keys = [*PATHS, *(f"stages.{name}.distill.teacher" for name in config.stages)]
    refuse(list(impossible_paths(flatten(dataclasses.asdict(config)), keys)))
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
    if config.model.weights == "auto":
        config.model.weights = schema.model.weights = resolve_weights(config.model)
    paths = [(config.data, "root"), (config.data, "labels"), (config, "run_dir"), (config, "resume")]
    for section, key in [*paths, *((stage.distill, "teacher") for stage in config.stages.values())]:
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
    return f"{data}-{config.model.name.rpartition('/')[2].replace(':', '-')}-{digest}"
