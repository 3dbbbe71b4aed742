"""What each technique changes: recipes x tasks x seeds, in two tables with intervals.

    python -m benchmarks.recipes --task 'clipart=FOLDER' --task 'letters=FOLDER data.hflip=false' --task digits
        --recipes frozen frozen-center [--recipe 'mine=frozen optim.label_smoothing=0.1'] [--forms full small long]

A recipe is a list of key=value arguments; a first word without `=` is another recipe that it adds to. A value `@NAME`
is the run directory of another recipe with the same images and seed, measured before with --keep. Choose by val, and
report test: where a folder has no test, half of its val becomes test. Each run has its own directory below --out:
run the same command again to measure what is missing. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.imbalance import link_long_tail
from benchmarks.measure import log, markdown, version
from benchmarks.plain_recipe import run_plain
from distil_tl.data.digits import digits_folder
from distil_tl.train import main as train
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_json

BASE = [
    "model.name=timm/tf_efficientnet_lite0", "data.image_size=128", "data.global_batch_size=32", "precision=fp32",
    "data.crop_mode=weights",
]  # fmt: skip
SEARCH = ["stages.head.search.lr=[3e-4,1e-3,3e-3,1e-2,3e-2,1e-1]", "stages.head.search.weight_decay=[0,0.01,0.1,1]"]
RECIPES: dict[str, list[str]] = {
    "default": [],
    # 24 heads on features of the frozen backbone; the best one trains for 15 epochs.
    "frozen": ["data.augment=none", "stages.head.epochs=15", "stages.full.epochs=0", *SEARCH],
    "frozen-center": ["frozen", "data.crop_mode=center"],
    "frozen-squash": ["frozen", "data.crop_mode=squash"],
    "frozen-squash-0.875": ["frozen", "data.crop_mode=squash", "data.crop_pct=0.875"],
    "frozen-border": ["frozen", "data.crop_mode=border"],
    "frozen-border-0.875": ["frozen", "data.crop_mode=border", "data.crop_pct=0.875"],
    "mixup": ["stages.full.mixup=0.2"],
    "cutmix": ["stages.full.cutmix=1"],
    "mixup-and-cutmix": ["stages.full.mixup=0.2", "stages.full.cutmix=1", "stages.full.mix_off_epochs=1"],
    "strong": ["stages.full.augment=strong"],
    "erasing": ["stages.full.augment=[crop(0.5),hflip,erasing(0.25)]"],
    "color": ["stages.full.augment=[crop(0.5),hflip,color(0.4)]"],
    "drop-path": ["model.drop_path=0.1"],
    "dropout": ["model.dropout=0.2"],
    "ema": ["stages.full.ema=0.99"],
    "wise-ft": ["stages.full.wise_ft=true"],
    "frozen-regularized": ["frozen", "stages.head.search.prefer=regularized"],
    # The loop of benchmarks/peers/plain.py, with keys of benchmarks/plain_recipe.py.
    "plain": ["loop=plain"],
    "plain-1e-3": ["plain", "full_lr=1e-3"],
}
FORMS = ("full", "small", "long")
SMALL, RATIO = 10, 20  # images of a class; largest to smallest class of a long tail
FIGURES = ("top1", "balanced_accuracy", "macro_f1", "loss")
# Half the width of a 95 % interval of a mean, in standard errors, by the degrees of freedom (Student's t).
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Task:
    """A folder with train/ and val/, and the arguments that belong to it."""

    name: str
    root: Path
    arguments: tuple[str, ...]


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", default=[], metavar="'NAME=FOLDER [KEY=VALUE ...]'",
                        help="or `digits`, those of the demo (default)")  # fmt: skip
    parser.add_argument("--recipe", action="append", default=[], metavar="'NAME=[OTHER] [KEY=VALUE ...]'",
                        help="a recipe to add")  # fmt: skip
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"default: those of --recipe; there are "
                        f"{', '.join(RECIPES)}")  # fmt: skip
    parser.add_argument("--forms", nargs="+", default=["full"], choices=FORMS, help=f"of the training images: all; "
                        f"{SMALL} of each class; a long tail, {RATIO}:1 (default: full)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--figure", default="top1", choices=FIGURES, help="of the tables (default: top1)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recipes"), help="runs and recipes.json")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of finished runs")
    options = parser.parse_args(args)
    return run_command("benchmarks.recipes", lambda: benchmark(options))


def benchmark(options: argparse.Namespace) -> None:
    known = {**RECIPES, **dict(named(text, "--recipe") for text in options.recipe)}
    chosen = options.recipes or [text.partition("=")[0] for text in options.recipe] or ["default"]
    recipes = {name: resolve(name, known) for name in chosen}
    tasks = [read_task(text) for text in options.task or ["digits"]]
    out = options.out.absolute()
    results: list[dict[str, Any]] = []
    for task in tasks:
        for form in options.forms:
            for seed in range(options.seeds):
                data = prepare(task, form, seed, out / "data")
                for name, arguments in recipes.items():
                    run_dir = out / f"{task.name}-{form}" / name / f"seed-{seed}"
                    own = with_runs(arguments, run_dir)
                    given = [*BASE, *task.arguments, *own, f"data.root={data}", f"seed={seed}"]
                    found = run(run_dir, given, keep=options.keep)
                    what = {"task": task.name, "form": form, "recipe": name, "seed": seed}
                    results.append({**what, "arguments": arguments, **found})
    versions = {name: version(name) for name in ("torch", "timm")}
    write_json(out / "recipes.json", {"base": BASE, "versions": versions, "runs": results})
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    sys.stdout.write(f"{options.seeds} seeds, {shown}\n\n{tables(results, options.figure)}\n{out / 'recipes.json'}\n")


def named(text: str, option: str) -> tuple[str, list[str]]:
    """'NAME=word word' as the name and the words.

    Raises:
        UserError: there is no name.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name or "/" in name or " " in name:
        raise UserError(f"{option} {text!r}: give 'NAME=...', with a name that can be a folder")
    return name, shlex.split(rest)


def resolve(name: str, known: dict[str, list[str]]) -> list[str]:
    """The arguments of a recipe, those of the recipe that it adds to first.

    Raises:
        UserError: there is no such recipe.
    """
    if name not in known:
        raise UserError(f"there is no recipe {name!r}; choose from {', '.join(known)}, or add one with --recipe")
    words = known[name]
    inherited = bool(words) and "=" not in words[0] and words[0] != name
    return [*resolve(words[0], known), *words[1:]] if inherited else words


def with_runs(arguments: Iterable[str], run_dir: Path) -> list[str]:
    """The arguments with the run directory of the recipe NAME, of the same task and seed, in place of a value @NAME."""
    split = (word.partition("=@") for word in arguments)
    return [f"{key}={run_dir.parent.parent / name / run_dir.name}" if name else key for key, _, name in split]


def read_task(text: str) -> Task:
    """The task of an option --task. Raises UserError."""
    if text == "digits":
        return Task("digits", digits_folder(), ("data.hflip=false",))
    name, words = named(text, "--task")
    if not words or not all((Path(words[0]) / split).is_dir() for split in ("train", "val")):
        raise UserError(f"--task {text!r}: give 'NAME=FOLDER', a folder with train/ and val/")
    return Task(name, Path(words[0]).absolute(), tuple(words[1:]))


def prepare(task: Task, form: str, seed: int, work: Path) -> Path:
    """A folder of links to the images of a form of a task, with train, val and test; made once."""
    if form == "full" and (task.root / "test").is_dir():
        return task.root
    target = work / (f"{task.name}-{form}" if form == "full" else f"{task.name}-{form}-{seed}")
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if form == "long":
        link_long_tail(task.root, partial, RATIO, seed)
        (partial / "val").unlink()
    else:
        rng, count = random.Random(seed), SMALL if form == "small" else None
        for folder in sorted(path for path in (task.root / "train").iterdir() if path.is_dir()):
            images = sorted(path for path in folder.iterdir() if path.is_file())
            link(images if count is None else rng.sample(images, min(count, len(images))), partial / "train")
    if (task.root / "test").is_dir():
        for split in ("val", "test"):
            (partial / split).symlink_to((task.root / split).resolve())
    else:
        divide(task.root / "val", partial)
    partial.rename(target)
    return target


def link(images: Iterable[Path], split: Path) -> None:
    """Link images into folders of their classes."""
    for image in images:
        (split / image.parent.name).mkdir(parents=True, exist_ok=True)
        (split / image.parent.name / image.name).symlink_to(image.resolve())


def divide(val: Path, target: Path) -> None:
    """Link one half of each class of `val` into target/val, the other into target/test; the same halves each time."""
    rng, longer = random.Random(0), 0
    for folder in sorted(path for path in val.iterdir() if path.is_dir()):
        images = sorted(path for path in folder.iterdir() if path.is_file())
        rng.shuffle(images)
        halves = images[::2], images[1::2]
        link(halves[longer], target / "val")
        link(halves[1 - longer], target / "test")
        longer ^= len(images) % 2  # classes of odd size: the longer half in turns


def run(run_dir: Path, arguments: list[str], *, keep: bool) -> dict[str, Any]:
    """The figures of a run: of its best epoch by val, on val and test. It is resumed or, if finished, read.

    Raises:
        UserError: it failed, or the folder holds a run with other arguments.
    """
    note, finished = run_dir / "recipe.json", read_summary(run_dir)
    if note.is_file() and json.loads(note.read_text()) != arguments:
        raise UserError(
            f"{run_dir} holds a run with other arguments: remove it, give the recipe another name, or --out"
        )
    if finished is None:
        log(f"{run_dir.parent.parent.name}  {run_dir.parent.name}  {run_dir.name}")
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(note, arguments)
        finished = train_plain(run_dir, arguments) if "loop=plain" in arguments else train_here(run_dir, arguments)
        if not keep:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    figures = {"val": finished["best"] or finished["final"], "test": finished["test"]}
    found: dict[str, Any] = {split: {key: figures[split].get(key) for key in FIGURES} for split in figures}
    return {**found, "seconds": finished["total_seconds"]}


def train_here(run_dir: Path, arguments: list[str]) -> dict[str, Any]:
    """summary.json of a run of distil_tl. Raises UserError if it failed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = train([*arguments, f"run_dir={run_dir}"])
    finished = read_summary(run_dir)
    if status or finished is None:
        raise UserError(f"{run_dir}: training ended with status {status}\n{said.getvalue()[-2000:]}")
    return finished


def train_plain(run_dir: Path, arguments: list[str]) -> dict[str, Any]:
    """summary.json of a run of the plain loop. Raises UserError."""
    values = dict(word.split("=", 1) for word in arguments)
    size, hflip = int(values["data.image_size"]), values.get("data.hflip") != "false"
    own = {key: value for key, value in values.items() if key not in ("loop", "seed", "precision") and "." not in key}
    run_plain(run_dir, own, Path(values["data.root"]), int(values["seed"]), hflip=hflip, size=size)
    finished = read_summary(run_dir)
    assert finished is not None
    return finished


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json of a finished run; None if it is not finished."""
    path = run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return summary if summary.get("status") == "completed" else None


def tables(results: Sequence[dict[str, Any]], figure: str) -> str:
    """For val and test: means with 95 % intervals over the seeds, and differences from the first recipe, by seed."""
    columns = list(dict.fromkeys((row["task"], row["form"]) for row in results))
    recipes = list(dict.fromkeys(row["recipe"] for row in results))
    header = [f"{task}, {form}" if form != "full" else task for task, form in columns]

    def values(recipe: str, column: tuple[str, str], split: str) -> dict[int, float]:
        chosen = [row for row in results if (row["task"], row["form"]) == column and row["recipe"] == recipe]
        return {row["seed"]: row["seconds"] if split == "seconds" else row[split][figure] for row in chosen}

    text = ""
    for split in ("val", "test"):
        rows = [[name, *(interval(values(name, column, split).values()) for column in columns)] for name in recipes]
        text += f"{figure} on {split}\n\n{markdown([split, *header], rows)}\n"
        rows = []
        for name in recipes[1:]:
            cells = []
            for column in columns:
                own, first = values(name, column, split), values(recipes[0], column, split)
                cells.append(interval((own[seed] - first[seed] for seed in own), sign="+"))
            rows.append([name, *cells])
        if rows:
            text += f"{figure} on {split}, less that of {recipes[0]}\n\n{markdown([split, *header], rows)}\n"
    rows = [[name, *(f"{statistics.mean(values(name, column, 'seconds').values()):.0f}" for column in columns)]
            for name in recipes]  # fmt: skip
    return f"{text}seconds, without the computation of features that were cached\n\n{markdown(['', *header], rows)}"


def interval(values: Iterable[float], sign: str = "") -> str:
    """The mean and half the width of its 95 % interval."""
    numbers = list(values)
    mean = f"{statistics.mean(numbers):{sign}.3f}"
    if len(numbers) < 2:
        return mean
    width = T95.get(len(numbers) - 1, 1.96) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{mean} ± {width:.3f}"


if __name__ == "__main__":
    sys.exit(main())
