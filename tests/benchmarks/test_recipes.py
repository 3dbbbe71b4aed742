"""benchmarks.recipes: forms of tasks, recipes that add to others, resumed matrices, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.peers.job import Events, Job, read_events
from benchmarks.recipes import __main__ as recipes
from benchmarks.recipes import chart, plain_loop, runs
from benchmarks.recipes.__main__ import resolve
from benchmarks.recipes.tables import interval, tables
from benchmarks.recipes.tasks import Task, prepare, read_task
from distil_tl.utils.errors import UserError


def make_images(root: Path, sizes: dict[str, dict[str, int]]) -> Path:
    for split, classes in sizes.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{split}{i}.png").touch()
    return root


def names(folder: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*")}


def test_half_of_val_becomes_test_where_there_is_none(tmp_path: Path) -> None:
    root = make_images(tmp_path / "data", {"train": {"a": 30, "b": 12}, "val": {"a": 5, "b": 5}})
    task = Task("t", root, ())
    full, small = prepare(task, "full", 0, tmp_path / "work"), prepare(task, "small", 1, tmp_path / "work")
    assert names(full / "train") == names(root / "train")
    val, test = names(full / "val"), names(full / "test")
    assert val | test == names(root / "val")
    assert not val & test
    assert len(val) == len(test) == 5, "classes of odd size give the longer half in turns"
    assert (names(small / "val"), names(small / "test")) == (val, test), "the same halves in all forms"
    assert prepare(task, "full", 1, tmp_path / "work") == full, "made once"


def test_small_and_long_forms_have_other_training_images_only(tmp_path: Path) -> None:
    sizes = {"train": {"a": 40, "b": 40, "c": 8}, "val": {"a": 3, "b": 3, "c": 3}, "test": {"a": 2, "b": 2, "c": 2}}
    task = Task("t", make_images(tmp_path / "data", sizes), ())
    assert prepare(task, "full", 0, tmp_path / "work") == task.root
    small = [names(prepare(task, "small", seed, tmp_path / "work") / "train") for seed in (0, 1)]
    assert [sum(name.startswith("a/") for name in found) for found in small] == [10, 10]
    assert sum(name.startswith("c/") for name in small[0]) == 8, "a smaller class keeps its images"
    assert small[0] != small[1], "another seed has other images"
    long = prepare(task, "long", 0, tmp_path / "work")
    assert sorted(len(list(folder.iterdir())) for folder in (long / "train").iterdir()) == [1, 2, 8]
    for split in ("val", "test"):
        assert names(long / split) == names(task.root / split)


def test_a_recipe_adds_to_another() -> None:
    known = {"base": ["a=1", "b=1"], "more": ["base", "b=2"], "most": ["more", "c=3"], "none": []}
    assert resolve("most", known) == ["a=1", "b=1", "b=2", "c=3"]
    assert resolve("none", known) == []
    with pytest.raises(UserError, match="there is no recipe 'bass'"):
        resolve("bass", known)
    for name in recipes.RECIPES:
        assert all("=" in word for word in resolve(name, recipes.RECIPES))


def test_a_value_can_be_the_run_of_another_recipe(tmp_path: Path) -> None:
    given = ["data.image_size=64", "stages.full.distill.teacher=@large"]
    found = runs.with_runs(given, tmp_path / "letters-full" / "taught" / "seed-2")
    assert found == ["data.image_size=64", f"stages.full.distill.teacher={tmp_path}/letters-full/large/seed-2"]


def test_wrong_tasks_are_named(tmp_path: Path) -> None:
    for text in ("flowers", f"flowers={tmp_path}", "flowers=", "a/b=c"):
        with pytest.raises(UserError, match="--task"):
            read_task(text)


def test_a_matrix_is_resumed_and_refuses_other_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_images(tmp_path / "data", {"train": {"a": 3, "b": 3}, "val": {"a": 2, "b": 2}})
    trained: list[list[str]] = []
    fails = True

    def train(arguments: list[str]) -> int:
        if fails and "seed=1" in arguments:
            return 1
        trained.append(arguments)
        run_dir = Path(arguments[-1].removeprefix("run_dir="))
        (run_dir / "checkpoints").mkdir()
        figures = dict.fromkeys(runs.FIGURES, 0.5 + 0.25 * ("x=1" in arguments))
        summary = {"status": "completed", "best": figures, "test": figures, "total_seconds": 2.0}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr(runs, "train", train)
    command = ["--task", f"t={root} y=2", "--recipe", "one=default x=1", "--recipes", "default", "one", "--seeds", "2",
               "--out", str(tmp_path / "out")]  # fmt: skip
    assert recipes.main(command) == 2
    assert "ended with status 1" in capsys.readouterr().err
    fails = False
    assert recipes.main(command) == 0
    assert len(trained) == 4, "what was finished is not trained again"
    assert "| one | +0.250 ± 0.000 |" in capsys.readouterr().out
    assert "y=2" in trained[0]
    assert not list((tmp_path / "out").rglob("checkpoints"))
    rows = json.loads((tmp_path / "out" / "recipes.json").read_text())["runs"]
    assert [(row["recipe"], row["seed"], row["test"]["top1"]) for row in rows] == [
        ("default", 0, 0.5), ("one", 0, 0.75), ("default", 1, 0.5), ("one", 1, 0.75)
    ]  # fmt: skip
    assert recipes.main([part.replace("x=1", "x=3") for part in command]) == 2
    assert "holds a run with other arguments" in capsys.readouterr().err


def test_tables_have_intervals_and_paired_differences() -> None:
    def row(recipe: str, seed: int, top1: float) -> dict[str, Any]:
        figures = {"top1": top1}
        return {"task": "t", "form": "small", "recipe": recipe, "seed": seed, "val": figures, "test": figures,
                "seconds": 3.0}  # fmt: skip

    runs = [("default", (0.5, 0.6, 0.7)), ("one", (0.6, 0.7, 0.8))]
    text = tables([row(name, seed, top1) for name, found in runs for seed, top1 in enumerate(found)], "top1")
    assert "| test | t, small |" in text
    assert "| default | 0.600 ± 0.248 |" in text, "Student's t for three values: 4.303 * 0.1 / sqrt(3)"
    assert "| one | +0.100 ± 0.000 |" in text
    assert interval([0.25]) == "0.250"


def test_the_plain_loop_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own rates and crop; it keeps an epoch by the rule of distil_tl, and test takes none of its time."""
    jobs: list[Job] = []

    def loop(job: Job, events: Events) -> None:
        jobs.append(job)
        for epoch, top1 in enumerate((0.25, 0.75, 0.0)):  # of 4 images: 0 is outside the interval of 0.75
            events.epoch("full", epoch, top1, 1.0)
            events.epoch("full", epoch, top1 + 0.125, 1.0, "test")

    monkeypatch.setattr("benchmarks.peers.plain.run", loop)
    root = make_images(tmp_path / "data", {"train": {"a": 3, "b": 3}, "val": {"a": 2, "b": 2}})
    command = [
        "--task",
        f"t={root} data.hflip=false",
        "--recipe",
        "mine=plain full_lr=1e-3 crop=squash augment=flip",
        "--seeds",
        "1",
    ]
    assert recipes.main([*command, "--recipes", "plain", "mine", "--out", str(tmp_path / "out")]) == 0
    found = [(job.stage("full").lr, job.stage("full").augment, job.squash, job.hflip, job.classes) for job in jobs]
    assert found == [(3e-4, "light", False, False, 2), (1e-3, "flip", True, False, 2)]
    (row, _) = json.loads((tmp_path / "out" / "recipes.json").read_text())["runs"]
    assert (row["val"]["top1"], row["test"]["top1"]) == (0.75, 0.875)
    with pytest.raises(UserError, match="the plain loop has no lr;"):
        plain_loop.run_plain(tmp_path, {"lr": "1"}, root, 0, hflip=True, size=32)
    events = Events(tmp_path / "events")
    events.epoch("head", 1, 0.5, 1.0)
    events.epoch("head", 1, 0.5, 1.0, "test")
    val, test = read_events(events.path)
    spent = plain_loop.summary([val, {**test, "time": val["time"] + 4}], 10.0, 4)["total_seconds"]
    assert spent == pytest.approx(6)


def test_the_plain_loop_keeps_the_last_epoch_where_val_cannot_tell_it_from_the_best(tmp_path: Path) -> None:
    events = Events(tmp_path / "events")
    for epoch, top1 in enumerate((0.75, 0.70)):
        events.epoch("full", epoch, top1, 1.0)
        events.epoch("full", epoch, top1 - 0.1, 1.0, "test")
    found = {n: plain_loop.summary(read_events(events.path), 10.0, n)["best"]["top1"] for n in (100, 10_000)}
    assert found == {100: 0.70, 10_000: 0.75}


def test_the_configuration_of_a_selection_is_trained_with_each_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is selected once, without the recipes' own backbone and size, and its seconds belong to each run."""
    selected: list[list[str]] = []
    trained: list[list[str]] = []

    def select(arguments: list[str]) -> int:
        selected.append(arguments)
        folder = Path(arguments[-1])
        folder.mkdir(parents=True)
        (folder / "best.yaml").touch()
        (folder / "select.json").write_text('{"seconds": 7}')
        return 0

    def train(arguments: list[str]) -> int:
        trained.append(arguments)
        figures = dict.fromkeys(runs.FIGURES, 0.5)
        summary = {"status": "completed", "best": figures, "test": figures, "total_seconds": 2.0}
        (Path(arguments[-1].removeprefix("run_dir=")) / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr(runs, "select", select)
    monkeypatch.setattr(runs, "train", train)
    root = make_images(tmp_path / "data", {"train": {"a": 3, "b": 3}, "val": {"a": 2, "b": 2}})
    out = tmp_path / "out"
    command = ["--task", f"t={root}", "--recipes", "select", "--seeds", "2", "--forms", "small", "--out", str(out)]
    assert recipes.main(command) == 0
    (arguments,) = selected
    assert "sizes=[128,192]" in arguments
    assert not [word for word in arguments if word.startswith(("model.name", "data.image_size", "seed", "loop"))]
    best = str(out / "t-small" / "select" / "select" / "best.yaml")
    assert [words[:3] for words in trained] == [
        [best, f"seed={seed}", f"data.root={out}/data/t-small-{seed}"] for seed in (0, 1)
    ], "each seed has its own images"
    found = json.loads((out / "recipes.json").read_text())["runs"]
    assert [row["seconds"] for row in found] == [9.0, 9.0]


def test_the_picture_has_a_panel_for_each_task() -> None:
    rows = [
        {
            "task": task,
            "form": "full",
            "recipe": recipe,
            "seed": seed,
            "test": {"top1": top1 + seed / 10},
            "seconds": 9.0,
        }
        for task in ("a", "b")
        for recipe, top1 in (("one", 0.5), ("two", 0.6))
        for seed in (0, 1)
    ]
    svg = ElementTree.fromstring(chart.draw(rows))
    space = "{http://www.w3.org/2000/svg}"
    assert svg.findtext(f"{space}desc") == "; ".join(f"{task}: one 0.550 in 9 s, two 0.650 in 9 s" for task in "ab")
    titles = [circle.findtext(f"{space}title") for circle in svg.iter(f"{space}circle")]
    assert titles.count("one: top-1 0.550 (0.500 to 0.600), 9 s") == 2
