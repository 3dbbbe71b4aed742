"""Sweep files: a list of trials, a grid, random draws and seeds, all combined with each other."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.training.config import METRICS
from distil_tl.utils.args import flatten, read_yaml, refuse
from distil_tl.utils.errors import UserError, did_you_mean
from distil_tl.utils.shipped import find_configuration

Values = dict[str, Any]
KEYS = ("name", "config", "set", "trials", "grid", "random", "count", "seed", "seeds", "max_trials", "metric", "slurm")
_NO_COUNT = "`random` needs `count`, the number of draws"
DISTRIBUTIONS = ("uniform", "log_uniform", "choice")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: the keys that it sets. Its name is a hash of these values only."""

    values: Values
    label: str | None = None

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.label}-{digest}" if self.label else digest

    @property
    def arguments(self) -> list[str]:
        return as_arguments(self.values)


@dataclass
class Sweep:
    """The content of a sweep file.

    Attributes:
        config: a training configuration that all trials share.
        set: keys that all trials change in it.
        trials: explicit trials, with or without a label.
        grid: lists of values, by key.
        random: distributions, by key, of which `count` values are drawn with `seed`.
        seeds: values of the training's `seed`.
        metric: ranks the trials, by `best` in summary.json. Larger is better, except for `loss`. Empty: as of the runs.
    """

    name: str
    config: Path | None = None
    set: Values = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    random: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    count: int | None = None
    seed: int = 0
    seeds: list[int] = field(default_factory=list)
    max_trials: int = 1000
    metric: str = ""

    def all_trials(self) -> list[Trial]:
        """All trials, in a fixed order. A larger `count` keeps the draws of a smaller one; equal draws are one trial.

        Raises:
            UserError: there are more than `max_trials`, two trials set the same values, or `count` is missing.
        """
        if self.random and self.count is None:
            raise UserError(_NO_COUNT)
        seeds: list[Values] = [{"seed": seed} for seed in self.seeds] or [{}]
        combinations = math.prod(map(len, self.grid.values()))
        number = max(1, len(self.trials)) * combinations * (self.count or 1) * len(seeds)
        if number > self.max_trials:
            raise UserError(
                f"the sweep has {number:,} trials, more than max_trials={self.max_trials:,}; reduce it, or raise "
                f"max_trials"
            )
        grids = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        all_draws = [draw(self.random, self.seed, i) for i in range(self.count or 0)] or [{}]
        draws = list({Trial(values).name: values for values in all_draws}.values())
        trials: dict[str, Trial] = {}
        for listed, grid, drawn, seed in itertools.product(self.trials or [Trial({})], grids, draws, seeds):
            trial = Trial({**listed.values, **grid, **drawn, **seed}, listed.label)
            if trial.name in trials:
                raise UserError(f"two trials of the sweep are equal: {', '.join(trial.arguments) or 'no key is set'}")
            trials[trial.name] = trial
        return list(trials.values())


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: it can't be read, or lists what is wrong with it.
    """
    path = find_configuration(path)
    tree = read_yaml(path)
    refuse(list(_problems(path, tree)))
    config = find_configuration(Path(str(tree["config"])), path.parent) if tree.get("config") is not None else None
    trials = tree.get("trials") or []
    labelled = trials.items() if isinstance(trials, dict) else ((None, values) for values in trials)
    return Sweep(
        name=str(tree.get("name") or path.stem),
        config=config,
        set=_flatten(tree.get("set")),
        trials=[Trial(_flatten(values), label) for label, values in labelled],
        grid=tree.get("grid") or {},
        random=tree.get("random") or {},
        count=tree.get("count"),
        seed=tree.get("seed", 0),
        seeds=tree.get("seeds") or [],
        max_trials=tree.get("max_trials", 1000),
        metric=tree.get("metric") or "",
    )


def _problems(path: Path, tree: dict[str, Any]) -> Iterator[str]:
    for key in tree:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS) or f"; valid keys are {', '.join(KEYS)}"
            yield f"unknown key `{key}` in {path}{hint}"
    for key in ("set", "grid", "random"):
        if not isinstance(tree.get(key) or {}, dict):
            yield f"`{key}` in {path} must hold keys and values"
            return
    yield from _value_problems(path, tree)
    trials = tree.get("trials") or []
    if not isinstance(trials, (dict, list)):
        yield f"trials: {trials!r} is not a list of trials"
        trials = []
    yield from _trial_problems(trials)
    yield from _space_problems(tree)
    yield from _overlap_problems(tree, list(trials.values() if isinstance(trials, dict) else trials))
    seeds = tree.get("seeds") or []
    if not isinstance(seeds, list) or not all(_is_integer(seed) for seed in seeds):
        yield "`seeds` must be a list of integers"


def _value_problems(path: Path, tree: dict[str, Any]) -> Iterator[str]:
    config = tree.get("config")
    if config is not None and not (found := find_configuration(Path(str(config)), path.parent)).is_file():
        yield f"config: there is no file {found}"
    if "name" in tree and not _is_name(tree["name"]):
        yield f"name: {tree['name']!r} can't be the name of a folder; use letters, digits, `_`, `-` and `.`"
    if tree.get("metric") not in (None, *METRICS):
        yield f"metric: {tree['metric']!r} is not one of {', '.join(METRICS)}"
    for key, minimum in (("seed", None), ("max_trials", 1)):
        if key in tree and not _is_integer(tree[key], minimum):
            yield f"`{key}` must be an integer" + (f", at least {minimum}" if minimum is not None else "")


def _trial_problems(trials: dict[Any, Any] | list[Any]) -> Iterator[str]:
    for label in trials if isinstance(trials, dict) else ():
        if not _is_name(label):
            yield f"trials: {label!r} can't be part of a folder's name; use letters, digits, `_`, `-` and `.`"
    for values in trials.values() if isinstance(trials, dict) else trials:
        if not isinstance(values, dict):
            yield f"trials: {values!r} must hold keys and values, as in `{{model.name: resnet18}}`"


def _space_problems(tree: dict[str, Any]) -> Iterator[str]:
    """What is wrong with `grid`, `random` and `count`."""
    for key, values in (tree.get("grid") or {}).items():
        if not isinstance(values, list) or not values:
            yield f"grid: `{key}` needs a list of values, not {values!r}"
    for key, distribution in (tree.get("random") or {}).items():
        yield from _distribution_problems(key, distribution)
    count = tree.get("count")
    if tree.get("random") and count is not None and not _is_integer(count, 1):
        yield _NO_COUNT
    if count is not None and not tree.get("random"):
        yield "`count` is the number of draws of `random`, but there is no `random`"


def _distribution_problems(key: str, distribution: Any) -> Iterator[str]:
    if not isinstance(distribution, dict) or len(distribution) != 1 or next(iter(distribution)) not in DISTRIBUTIONS:
        yield f"random: `{key}` needs one of {', '.join(DISTRIBUTIONS)}, as in `{{log_uniform: [1e-5, 1e-2]}}`"
        return
    ((kind, values),) = distribution.items()
    if not isinstance(values, list) or not values:
        yield f"random: `{key}`: {kind} needs a list"
    elif kind != "choice":
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(values) != 2 or len(numbers) != 2 or numbers[0] >= numbers[1]:
            yield f"random: `{key}`: {kind} needs [smallest, largest]"
        elif kind == "log_uniform" and numbers[0] <= 0:
            yield f"random: `{key}`: log_uniform needs numbers above 0"


def _overlap_problems(tree: dict[str, Any], trials: list[Any]) -> Iterator[str]:
    """Keys that two parts of the sweep set."""
    listed = [set(_flatten(values)) for values in trials if isinstance(values, dict)]
    parts = [set().union(*listed), set(tree.get("grid") or {}), set(tree.get("random") or {})]
    parts.append({"seed"} if tree.get("seeds") else set())
    for one, other in itertools.combinations(parts, 2):
        for key in sorted(one & other):
            yield f"`{key}` is varied twice"


def _is_name(value: Any) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", str(value)) is not None


def _is_integer(value: Any, minimum: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (minimum is None or value >= minimum)


def draw(space: dict[str, dict[str, list[Any]]], seed: int, number: int) -> Values:
    """The `number`-th draw of each key. A key's draws do not depend on the other keys."""
    return {
        key: draw_value(random.Random(f"{seed} {number} {key}"), distribution) for key, distribution in space.items()
    }


def draw_value(rng: Any, distribution: dict[str, list[Any]]) -> Any:
    """A value of one key, rounded to four digits.

    Args:
        rng: has `choice` and `uniform`, as random.Random has.
    """
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return rng.choice(values)
    low, high = map(float, values)
    number = rng.uniform(low, high) if kind == "uniform" else math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(max(float(f"{number:.4g}"), low), high)


def as_arguments(values: Values) -> list[str]:
    """The values as `key=value` arguments of training."""
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value) if value is not None else "null"


def _flatten(tree: Values | None) -> Values:
    """Dotted keys, from nested or dotted ones."""
    return {key: value for key, value in flatten(tree).items() if key} if tree else {}


def varied_keys(trials: Sequence[Trial]) -> list[str]:
    """The keys that at least one trial sets, in order of appearance."""
    return list(dict.fromkeys(key for trial in trials for key in trial.values))
