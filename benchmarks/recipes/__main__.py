"""What each technique changes: recipes x tasks x seeds, in two tables with intervals.

    python -m benchmarks.recipes --task 'clipart=FOLDER' --task 'letters=FOLDER data.hflip=false' --task digits
        --recipes frozen frozen-center [--recipe 'mine=frozen optim.label_smoothing=0.1'] [--forms full small long]

A recipe is a list of key=value arguments; a first word without `=` is another recipe that it adds to. A value `@NAME`
is the run directory of another recipe with the same images and seed, measured before with --keep. Choose by val, and
report test: where a folder has no test, half of its val becomes test. Each run has its own directory below --out, and
its own cache: run the same command again to measure what is missing. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import version
from benchmarks.recipes.chart import draw
from benchmarks.recipes.runs import FIGURES, run, with_runs
from benchmarks.recipes.tables import tables
from benchmarks.recipes.tasks import FORMS, RATIO, SMALL, named, prepare, read_task
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic, write_json

BASE = [
    "model.name=timm/tf_efficientnet_lite0", "data.image_size=128", "data.global_batch_size=32", "precision=fp32",
]  # fmt: skip
LITE = [f"timm/tf_efficientnet_lite{size}" for size in (0, 1, 2)]
SEARCH = ["stages.head.search.lr=[3e-4,1e-3,3e-3,1e-2,3e-2,1e-1]", "stages.head.search.weight_decay=[0,0.01,0.1,1]"]
RECIPES: dict[str, list[str]] = {
    # Earlier defaults, with which most tables of docs/recipes.md were measured.
    "default": [
        "data.crop_mode=weights",
        "data.augment=light",
        "stages.head.augment=null",
        "stages.full.wise_ft=false",
    ],
    # 24 heads on features of the frozen backbone; the best one trains for 15 epochs.
    "frozen": ["data.crop_mode=weights", "data.augment=none", "stages.head.epochs=15", "stages.full.epochs=0", *SEARCH],
    "frozen-center": ["frozen", "data.crop_mode=center"],
    "frozen-squash": ["frozen", "data.crop_mode=squash"],
    "frozen-squash-0.875": ["frozen", "data.crop_mode=squash", "data.crop_pct=0.875"],
    "frozen-border": ["frozen", "data.crop_mode=border"],
    "frozen-border-0.875": ["frozen", "data.crop_mode=border", "data.crop_pct=0.875"],
    "mixup": ["default", "stages.full.mixup=0.2"],
    "cutmix": ["default", "stages.full.cutmix=1"],
    "mixup-and-cutmix": ["default", "stages.full.mixup=0.2", "stages.full.cutmix=1", "stages.full.mix_off_epochs=1"],
    "strong": ["default", "stages.full.augment=strong"],
    "erasing": ["default", "stages.full.augment=[crop(0.5),hflip,erasing(0.25)]"],
    "color": ["default", "stages.full.augment=[crop(0.5),hflip,color(0.4)]"],
    "drop-path": ["default", "model.drop_path=0.1"],
    "dropout": ["default", "model.dropout=0.2"],
    "ema": ["default", "stages.full.ema=0.99"],
    "wise-ft": ["default", "stages.full.wise_ft=true"],
    "frozen-regularized": ["frozen", "stages.head.search.prefer=regularized"],
    # Those of configs/recipes.
    "quick": ["recipe=quick"],
    "standard": ["recipe=standard"],
    "best": ["recipe=best"],
    # The loop of benchmarks/peers/plain.py, with keys of plain_loop.py.
    "plain": ["loop=plain"],
    "plain-1e-3": ["plain", "full_lr=1e-3"],
    # What distil-tl select chooses with the first seed; its best.yaml is then trained with each seed.
    "select": ["loop=select", f"candidates=[{','.join(LITE)}]", "sizes=[128,192]"],
}


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", default=[], metavar="'NAME=FOLDER [KEY=VALUE ...]'",
                        help="with train/ and val/; or `digits`, those of the demo (default)")  # fmt: skip
    parser.add_argument("--recipe", action="append", default=[], metavar="'NAME=[OTHER] [KEY=VALUE ...]'",
                        help="a recipe to add")  # fmt: skip
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"default: those of --recipe; there are "
                        f"{', '.join(RECIPES)}")  # fmt: skip
    parser.add_argument("--forms", nargs="+", default=["full"], choices=FORMS, help=f"of the training images: all; "
                        f"{SMALL} of each class; a long tail, {RATIO}:1 (default: full)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--figure", default="top1", choices=FIGURES, help="of the tables (default: top1)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/recipes"), help="runs, recipes.json and "
                        "recipes.svg, a picture of accuracy against time")  # fmt: skip
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
                    if "data.hflip=false" in task.arguments:  # which a list of steps must not contradict
                        own = [word.replace(",hflip", "") for word in own]
                    given = [*BASE, *task.arguments, *own, f"data.root={data}", f"seed={seed}"]
                    found = run(run_dir, given, keep=options.keep)
                    what = {"task": task.name, "form": form, "recipe": name, "seed": seed}
                    results.append({**what, "arguments": arguments, **found})
    versions = {name: version(name) for name in ("torch", "timm")}
    write_json(out / "recipes.json", {"base": BASE, "versions": versions, "runs": results})
    write_atomic(out / "recipes.svg", draw(results))
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    files = f"{out / 'recipes.json'}\n{out / 'recipes.svg'}\n"
    sys.stdout.write(f"{options.seeds} seeds, {shown}\n\n{tables(results, options.figure)}\n{files}")


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


if __name__ == "__main__":
    sys.exit(main())
