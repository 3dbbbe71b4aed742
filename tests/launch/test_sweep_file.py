"""Sweep files: their trials, with values and names."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distil_tl import config as configuration
from distil_tl.utils.errors import UserError
from launch.sweep_file import Sweep, Trial, Values, as_arguments, draw, read_sweep
from tests.helpers.paths import ROOT


@pytest.fixture
def sweep_file(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "sweep.yaml").write_text(text)
        return tmp_path / "sweep.yaml"

    return write


def values_of(sweep: Sweep) -> list[Values]:
    return [trial.values for trial in sweep.all_trials()]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_sweep(path).all_trials()
    return str(caught.value)


# Names


def test_a_name_is_a_hash_of_what_is_set() -> None:
    """Pinned: with other names all trials would be trained again."""
    values = {"stages.full.lr": 1e-3, "optim.name": "adamw", "stages.full.unfreeze": ["layer4", "head"], "seed": 0}
    assert Trial(values).name == "817cf3c1e2"
    assert Trial(values, "staged").name == "staged-817cf3c1e2"
    assert Trial({}).name == "44136fa355"


@given(st.permutations([("a", 1), ("b", 0.5), ("c", "x"), ("d", [1, 2]), ("e", None), ("f", True)]))
def test_a_name_does_not_depend_on_the_order_of_keys(pairs: list[tuple[str, Any]]) -> None:
    assert Trial(dict(pairs)).name == Trial(dict(sorted(pairs))).name


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": "1"}, {"a": True}, {"a": [1]}, {"a": 1, "b": 1}, {}])
def test_other_values_have_another_name(other: Values) -> None:
    assert Trial(other).name != Trial({"a": 1}).name


def test_nested_and_dotted_keys_are_the_same_trial(sweep_file) -> None:
    nested = read_sweep(sweep_file("trials: [{stages: {head: {lr: 0.1}}, seed: 1}]")).all_trials()
    dotted = read_sweep(sweep_file("trials: [{seed: 1, stages.head.lr: 0.1}]")).all_trials()
    assert [trial.name for trial in nested] == [trial.name for trial in dotted]


# Products


def test_a_grid_is_every_combination() -> None:
    assert values_of(Sweep("s", grid={"a": [1, 2], "b": ["x", "y"]})) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_an_empty_sweep_is_one_trial_that_sets_no_key() -> None:
    assert values_of(Sweep("s")) == [{}]


def test_a_list_of_trials_and_one_with_labels(sweep_file) -> None:
    listed = read_sweep(sweep_file("trials: [{}, {model.name: resnet18}, {seed: 1, precision: bf16}]"))
    assert values_of(listed) == [{}, {"model.name": "resnet18"}, {"seed": 1, "precision": "bf16"}]
    assert {trial.label for trial in listed.all_trials()} == {None}
    named = read_sweep(sweep_file("trials: {plain: {}, small: {model.name: resnet18}, 18: {seed: 2}}")).all_trials()
    assert [trial.name.rpartition("-")[0] for trial in named] == ["plain", "small", "18"]


def test_all_parts_are_multiplied(sweep_file) -> None:
    sweep = read_sweep(
        sweep_file(
            "{trials: {a: {x: 1}, b: {x: 2}}, grid: {y: [1, 2, 3]}, random: {z: {uniform: [0, 1]}}, count: 5,"
            " seeds: [0, 1]}"
        )
    )
    trials = sweep.all_trials()
    assert len(trials) == len({trial.name for trial in trials}) == 2 * 3 * 5 * 2
    assert all(trial.values.keys() == {"x", "y", "z", "seed"} for trial in trials)
    assert {(trial.label, trial.values["x"]) for trial in trials} == {("a", 1), ("b", 2)}


def test_the_order_of_trials_is_the_files() -> None:
    sweep = Sweep("s", trials=[Trial({"x": 2}), Trial({"x": 1})], seeds=[5, 3])
    assert [(v["x"], v["seed"]) for v in values_of(sweep)] == [(2, 5), (2, 3), (1, 5), (1, 3)]


def test_too_many_trials_are_refused_before_they_are_made() -> None:
    grid = {f"key{i}": list(range(10)) for i in range(12)}
    with pytest.raises(UserError, match="the sweep has 1,000,000,000,000 trials, more than max_trials=1,000"):
        Sweep("s", grid=grid).all_trials()
    with pytest.raises(UserError, match="has 4 trials, more than max_trials=3; reduce it, or raise max_trials"):
        Sweep("s", seeds=[1, 2, 3, 4], max_trials=3).all_trials()
    assert len(Sweep("s", seeds=[1, 2, 3, 4], max_trials=4).all_trials()) == 4
    with pytest.raises(UserError, match="has 8 trials"):
        Sweep("s", trials=[Trial({}, "a"), Trial({}, "b")], seeds=[1, 2, 3, 4], max_trials=7).all_trials()


@pytest.mark.parametrize(
    ("sweep", "which"),
    [
        (Sweep("s", trials=[Trial({"x": 1}), Trial({"x": 1})]), "x=1"),
        (Sweep("s", grid={"x": [1, 2, 1]}), "x=1"),
        (Sweep("s", seeds=[3, 3]), "seed=3"),
        (Sweep("s", trials=[Trial({}), Trial({})]), "no key is set"),
    ],
)
def test_the_same_trial_twice_is_refused_by_name(sweep: Sweep, which: str) -> None:
    with pytest.raises(UserError, match=f"two trials of the sweep are equal: {which}"):
        sweep.all_trials()


# Draws


@given(
    seed=st.integers(0, 5),
    number=st.integers(0, 50),
    low=st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.9g}")),
    width=st.floats(1e-6, 1e6),
)
def test_uniform_draws_stay_within_their_range(seed: int, number: int, low: float, width: float) -> None:
    high = low + width
    found = draw({"x": {"uniform": [low, high]}}, seed, number)["x"]
    assert isinstance(found, float)
    assert low <= found <= high


@given(seed=st.integers(0, 5), number=st.integers(0, 50), low=st.floats(1e-9, 1e3), factor=st.floats(1.0001, 1e6))
def test_log_uniform_draws_stay_within_their_range(seed: int, number: int, low: float, factor: float) -> None:
    found = draw({"x": {"log_uniform": [low, low * factor]}}, seed, number)["x"]
    assert low <= found <= low * factor


def test_draws_cover_their_distributions() -> None:
    space: dict[str, dict[str, list[Any]]] = {
        "u": {"uniform": [0, 10]},
        "l": {"log_uniform": [1e-4, 1]},
        "c": {"choice": ["a", 1, None, [1]]},
    }
    draws = [draw(space, 0, i) for i in range(400)]
    for tenth in range(10):
        assert 20 <= sum(tenth <= d["u"] < tenth + 1 for d in draws) <= 60
    for decade in range(-4, 0):
        assert 70 <= sum(decade <= math.log10(d["l"]) < decade + 1 for d in draws) <= 130
    for value in ("a", 1, None, [1]):
        assert 70 <= sum(d["c"] == value for d in draws) <= 130


def test_draws_are_the_same_everywhere() -> None:
    """Pinned, also in a process with another hash seed: names of trials depend on the draws."""
    code = (
        "from launch.sweep_file import draw\n"
        "print(draw({'a': {'log_uniform': [1e-5, 1e-2]}, 'b': {'choice': [1, 2, 3]}, 'c': {'uniform': [0, 1]}}, 0, 3))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "{'a': 2.057e-05, 'b': 2, 'c': 0.3684}\n"


SPACE: dict[str, dict[str, list[Any]]] = {"lr": {"log_uniform": [1e-5, 1e-2]}, "decay": {"uniform": [0.5, 1]}}


def test_a_larger_count_keeps_the_earlier_draws() -> None:
    few, many = (values_of(Sweep("s", random=SPACE, count=count)) for count in (5, 30))
    assert many[:5] == few
    assert len({v["lr"] for v in many}) > 25, "they are not all one"


def test_another_key_leaves_a_keys_draws_as_they_are() -> None:
    more = {"first": {"choice": [1, 2]}, **SPACE, "last": {"uniform": [0, 1]}}
    before, after = (values_of(Sweep("s", random=space, count=8)) for space in (SPACE, more))
    assert [(v["lr"], v["decay"]) for v in before] == [(v["lr"], v["decay"]) for v in after]


def test_keys_of_the_same_range_have_draws_of_their_own() -> None:
    draws = [draw({"a": {"uniform": [0, 1]}, "b": {"uniform": [0, 1]}}, 0, i) for i in range(50)]
    assert sum(d["a"] == d["b"] for d in draws) < 3


def test_another_seed_draws_others() -> None:
    one, two = (values_of(Sweep("s", random=SPACE, count=8, seed=seed)) for seed in (0, 1))
    assert not {v["lr"] for v in one} & {v["lr"] for v in two}


def test_equal_draws_are_one_trial() -> None:
    """Draws are rounded, and a choice has few values, so equal draws are likely."""
    few = Sweep("s", random={"x": {"choice": ["a", "b"]}}, count=20)
    assert sorted(v["x"] for v in values_of(few)) == ["a", "b"]
    assert 900 < len(values_of(Sweep("s", random={"x": {"log_uniform": [0.1, 1]}}, count=1000))) < 1000
    larger = Sweep("s", random={"x": {"choice": ["a", "b"]}}, count=40)
    assert values_of(larger) == values_of(few)


def test_drawn_numbers_are_short_to_read() -> None:
    draws = [draw(SPACE, 0, i) for i in range(50)]
    assert all(value == float(f"{value:.4g}") for d in draws for value in d.values())


# As arguments


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages.head.lr", 1e-5),
        ("stages.head.lr", 0.1),
        ("stages.head.epochs", 3),
        ("data.hflip", False),
        ("data.image_size", None),
        ("model.name", "resnet18"),
        ("precision", "bf16"),
        ("stages.full.unfreeze", "all"),
        ("stages.full.unfreeze", 2),
        ("stages.full.unfreeze", ["layer4", "head"]),
    ],
)
def test_a_value_is_unchanged_by_the_command_line(key: str, value: Any) -> None:
    (argument,) = as_arguments({key: value})
    config: Any = configuration.load([argument, "model.weights=none"])[0]
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    assert config == value
    assert type(config) is type(value)


# The file


def test_everything_in_a_file(sweep_file, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1")
    sweep = read_sweep(
        sweep_file(
            "{name: rates, config: base.yaml, set: {optim: {name: sgd}}, grid: {stages.head.lr: [1e-3]},"
            " random: {optim.momentum: {uniform: [0.8, 1]}}, count: 2, seed: 4, seeds: [1], max_trials: 9,"
            " metric: loss, slurm: {nodes: 2}}"
        )
    )
    assert sweep == Sweep(
        "rates", tmp_path / "base.yaml", {"optim.name": "sgd"}, [], {"stages.head.lr": [1e-3]},
        {"optim.momentum": {"uniform": [0.8, 1]}}, 2, 4, [1], 9, "loss",
    )  # fmt: skip


def test_a_sweep_is_named_after_its_file(sweep_file) -> None:
    assert read_sweep(sweep_file("seeds: [1, 2]")).name == "sweep"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grids: {a: [1]}", "unknown key `grids` in {path}, did you mean `grid`?"),
        ("zzz: 1", "unknown key `zzz` in {path}; valid keys are name, config, set,"),
        ("grid: [1]", "`grid` in {path} must hold keys and values"),
        ("set: 5", "`set` in {path} must hold keys and values"),
        ("random: [1]", "`random` in {path} must hold keys and values"),
        ("grid: {a: 1}", "grid: `a` needs a list of values, not 1"),
        ("grid: {a: []}", "grid: `a` needs a list of values, not []"),
        ("grid: {stages: {head: [1]}}", "grid: `stages` needs a list of values"),
        ("trials: 5", "trials: 5 is not a list of trials"),
        ("trials: [5]", "trials: 5 must hold keys and values, as in `{{model.name: resnet18}}`"),
        ("trials: {a/b: {}}", "trials: 'a/b' can't be part of a folder's name"),
        ("trials: {..: {}}", "trials: '..' can't be part of a folder's name"),
        ("name: a/b", "name: 'a/b' can't be the name of a folder"),
        ("config: nowhere.yaml", "config: there is no file {folder}/nowhere.yaml"),
        ("config: 5", "config: there is no file {folder}/5"),
        ("{random: {a: 1}, count: 1}", "random: `a` needs one of uniform, log_uniform, choice, as in"),
        ("{random: {a: {normal: [0, 1]}}, count: 1}", "random: `a` needs one of uniform, log_uniform, choice"),
        ("{random: {a: {uniform: [0, 1], choice: [1]}}, count: 1}", "random: `a` needs one of"),
        ("{random: {a: {choice: 5}}, count: 1}", "random: `a`: choice needs a list"),
        ("{random: {a: {choice: []}}, count: 1}", "random: `a`: choice needs a list"),
        ("{random: {a: {uniform: [1]}}, count: 1}", "random: `a`: uniform needs [smallest, largest]"),
        ("{random: {a: {uniform: [1, 0]}}, count: 1}", "random: `a`: uniform needs [smallest, largest]"),
        ("{random: {a: {uniform: [x, y]}}, count: 1}", "random: `a`: uniform needs [smallest, largest]"),
        ("{random: {a: {uniform: [false, true]}}, count: 1}", "random: `a`: uniform needs [smallest, largest]"),
        ("{random: {a: {log_uniform: [0, 1]}}, count: 1}", "random: `a`: log_uniform needs numbers above 0"),
        ("random: {a: {choice: [1]}}", "`random` needs `count`, the number of draws"),
        ("{random: {a: {choice: [1]}}, count: many}", "`random` needs `count`, the number of draws"),
        ("{random: {a: {choice: [1]}}, count: true}", "`random` needs `count`, the number of draws"),
        ("count: 5", "`count` is the number of draws of `random`, but there is no `random`"),
        ("{trials: [{a: 1}], grid: {a: [2]}}", "`a` is varied twice"),
        ("{grid: {a: [2]}, random: {a: {choice: [1]}}, count: 1}", "`a` is varied twice"),
        ("{trials: [{}, {seed: 1}], seeds: [1]}", "`seed` is varied twice"),
        ("{trials: [{stages: {head: {lr: 1}}}], grid: {stages.head.lr: [2]}}", "`stages.head.lr` is varied twice"),
        ("seeds: [1.5]", "`seeds` must be a list of integers"),
        ("seeds: 5", "`seeds` must be a list of integers"),
        ("seeds: [true]", "`seeds` must be a list of integers"),
        ("seed: x", "`seed` must be an integer"),
        ("max_trials: many", "`max_trials` must be an integer, at least 1"),
        ("max_trials: 0", "`max_trials` must be an integer, at least 1"),
        ("metric: accuracy", "metric: 'accuracy' is not one of top1, top5, macro_f1, balanced_accuracy, loss"),
    ],
)
def test_mistakes_are_named(sweep_file, tmp_path: Path, text: str, message: str) -> None:
    path = sweep_file(text)
    assert message.format(path=path, folder=tmp_path) in refusal(path)


def test_all_mistakes_are_listed_together(sweep_file) -> None:
    message = refusal(sweep_file("{zzz: 1, grid: {a: 1}, count: 3, seeds: [x], metric: x, trials: [1]}"))
    assert message.startswith("6 problems:\n")


def test_a_missing_file(tmp_path: Path) -> None:
    assert "there is no configuration file" in refusal(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_in_configs_mean_what_their_headers_say(path: Path) -> None:
    sweep = read_sweep(path)
    header = path.read_text().split("\n\n")
    trials = sweep.all_trials()
    assert any(f"{len(trials)} trials" in part for part in header if part.startswith("#"))


def test_the_sweep_of_the_documentation_is_one_of_40_trials(tmp_path: Path) -> None:
    text = (ROOT / "docs/cluster.md").read_text()
    (block,) = (part for part in text.split("```")[1::2] if part.startswith("yaml\nconfig:"))
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "resnet50.yaml").touch()
    (tmp_path / "sweeps/x.yaml").write_text(block.removeprefix("yaml\n"))
    assert "= 40 trials." in text
    assert len(read_sweep(tmp_path / "sweeps/x.yaml").all_trials()) == 40
