"""What a sweep tries: an explicit list, a grid, random draws and seeds, multiplied with each other."""

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

from distil_tl.utils.args import flatten, read_yaml, refuse
from distil_tl.utils.errors import UserError, did_you_mean

Values = dict[str, Any]
KEYS = ("name", "config", "set", "trials", "grid", "random", "count", "seed", "seeds", "max_trials", "metric", "slurm")
METRICS = ("top1", "top5", "macro_f1", "loss")
DISTRIBUTIONS = ("uniform", "log_uniform", "choice")


@dataclass(frozen=True)
class Trial:
    """One training of a sweep: what it sets, and a name made of that alone."""

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
    """A sweep file.

    Attributes:
        config: the training configuration that all trials share, and `set` what they change in it.
        trials: sets of keys, by label where they have one.
        metric: of summary.json's `best`, by which trials are ranked; larger is better, except of `loss`.
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
    metric: str = "top1"

    def all_trials(self) -> list[Trial]:
        """Every trial once, in a fixed order; a larger `count` adds to the draws of a smaller one. Equal draws are one.

        Raises:
            UserError: there are more than `max_trials`, or two are one and the same.
        """
        seeds: list[Values] = [{"seed": seed} for seed in self.seeds] or [{}]
        combinations = math.prod(map(len, self.grid.values()))
        number = max(1, len(self.trials)) * combinations * (self.count or 1) * len(seeds)
        if number > self.max_trials:
            raise UserError(
                f"the sweep has {number:,} trials, more than max_trials={self.max_trials:,}; try less, or raise "
                f"max_trials"
            )
        grids = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        drawn_all = [draw(self.random, self.seed, i) for i in range(self.count or 0)] or [{}]
        draws = list({Trial(drawn).name: drawn for drawn in drawn_all}.values())
        found: dict[str, Trial] = {}
        for given, grid, drawn, seed in itertools.product(self.trials or [Trial({})], grids, draws, seeds):
            trial = Trial({**given.values, **grid, **drawn, **seed}, given.label)
            if trial.name in found:
                raise UserError(f"two trials of the sweep are the same: {', '.join(trial.arguments) or 'nothing set'}")
            found[trial.name] = trial
        return list(found.values())


def read_sweep(path: Path) -> Sweep:
    """A sweep file.

    Raises:
        UserError: it can't be read, or listing what is wrong with it.
    """
    tree = read_yaml(path, ())
    refuse(list(_problems(path, tree)))
    config = path.parent / tree["config"] if tree.get("config") is not None else None
    given = tree.get("trials") or []
    labelled = given.items() if isinstance(given, dict) else ((None, values) for values in given)
    return Sweep(
        name=str(tree.get("name") or path.stem),
        config=config,
        set=_flat(tree.get("set")),
        trials=[Trial(_flat(values), label) for label, values in labelled],
        grid=tree.get("grid") or {},
        random=tree.get("random") or {},
        count=tree.get("count"),
        seed=tree.get("seed", 0),
        seeds=tree.get("seeds") or [],
        max_trials=tree.get("max_trials", 1000),
        metric=tree.get("metric", "top1"),
    )


def _problems(path: Path, tree: dict[str, Any]) -> Iterator[str]:
    for key in tree:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS) or f"; known are {', '.join(KEYS)}"
            yield f"unknown key `{key}` in {path}{hint}"
    for key in ("set", "grid", "random"):
        if not isinstance(tree.get(key) or {}, dict):
            yield f"`{key}` in {path} must hold keys and values"
            return
    config = tree.get("config")
    if config is not None and not (path.parent / str(config)).is_file():
        yield f"config: there is no file {path.parent / str(config)}"
    if "name" in tree and not _is_name(tree["name"]):
        yield f"name: {tree['name']!r} can't name a folder; use letters, digits, `_`, `-` and `.`"
    if tree.get("metric", "top1") not in METRICS:
        yield f"metric: {tree['metric']!r} is none of {', '.join(METRICS)}"
    for key, least in (("seed", None), ("max_trials", 1)):
        if key in tree and not _is_whole(tree[key], least):
            yield f"`{key}` is a whole number" + (f", at least {least}" if least is not None else "")
    given = tree.get("trials") or []
    if not isinstance(given, (dict, list)):
        yield f"trials: {given!r} is no list of trials"
        given = []
    listed = list(given.values() if isinstance(given, dict) else given)
    for label in given if isinstance(given, dict) else ():
        if not _is_name(label):
            yield f"trials: {label!r} can't be part of a folder's name; use letters, digits, `_`, `-` and `.`"
    for values in listed:
        if not isinstance(values, dict):
            yield f"trials: {values!r} is no set of keys, as in `{{model.name: resnet18}}`"
    for key, values in (tree.get("grid") or {}).items():
        if not isinstance(values, list) or not values:
            yield f"grid: `{key}` needs a list of values, not {values!r}"
    for key, how in (tree.get("random") or {}).items():
        yield from _random_problems(key, how)
    count = tree.get("count")
    if tree.get("random") and not _is_whole(count, 1):
        yield "`random` needs `count`, the number of draws"
    if count is not None and not tree.get("random"):
        yield "`count` is the number of draws of `random`, which is not there"
    keys = [set(_flat(values)) for values in listed if isinstance(values, dict)]
    parts = [set().union(*keys), set(tree.get("grid") or {}), set(tree.get("random") or {})]
    parts.append({"seed"} if tree.get("seeds") else set())
    for one, two in itertools.combinations(parts, 2):
        for key in sorted(one & two):
            yield f"`{key}` is varied twice"
    seeds = tree.get("seeds") or []
    if not isinstance(seeds, list) or not all(_is_whole(seed) for seed in seeds):
        yield "`seeds` is a list of whole numbers"


def _is_name(value: Any) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", str(value)) is not None


def _is_whole(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _random_problems(key: str, how: Any) -> Iterator[str]:
    if not isinstance(how, dict) or len(how) != 1 or next(iter(how)) not in DISTRIBUTIONS:
        yield f"random: `{key}` needs one of {', '.join(DISTRIBUTIONS)}, as in `{{log_uniform: [1e-5, 1e-2]}}`"
        return
    ((kind, values),) = how.items()
    if not isinstance(values, list) or not values:
        yield f"random: `{key}`: {kind} needs a list"
    elif kind != "choice":
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(values) != 2 or len(numbers) != 2 or numbers[0] >= numbers[1]:
            yield f"random: `{key}`: {kind} needs [smallest, largest]"
        elif kind == "log_uniform" and numbers[0] <= 0:
            yield f"random: `{key}`: log_uniform needs numbers above 0"


def draw(space: dict[str, dict[str, list[Any]]], seed: int, number: int) -> Values:
    """The `number`-th draw of each key; a key's draws do not depend on which others there are."""
    return {key: draw_value(random.Random(f"{seed} {number} {key}"), how) for key, how in space.items()}


def draw_value(rng: Any, how: dict[str, list[Any]]) -> Any:
    """A value of one key, from `rng.choice` and `rng.uniform`."""
    ((kind, values),) = how.items()
    if kind == "choice":
        return rng.choice(values)
    low, high = map(float, values)
    number = rng.uniform(low, high) if kind == "uniform" else math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(max(float(f"{number:.4g}"), low), high)  # short to read


def as_arguments(values: Values) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value) if value is not None else "null"


def _flat(tree: Values | None) -> Values:
    """Nested or dotted, keys come out dotted."""
    return {key: value for key, value in flatten(tree).items() if key} if tree else {}


def same_keys(trials: Sequence[Trial]) -> list[str]:
    """The keys that any trial sets, in order of appearance."""
    return list(dict.fromkeys(key for trial in trials for key in trial.values))
