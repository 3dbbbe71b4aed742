"""A recipe trained on a task: by distil_tl, by the plain loop, or by what distil-tl select has chosen."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measure import log
from benchmarks.recipes.plain_loop import run_plain
from distil_tl.cli.select import main as select
from distil_tl.train import main as train
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_json

FIGURES = ("top1", "balanced_accuracy", "macro_f1", "loss")


def with_runs(arguments: Iterable[str], run_dir: Path) -> list[str]:
    """The arguments with the run directory of the recipe NAME, of the same task and seed, in place of a value @NAME."""
    split = (word.partition("=@") for word in arguments)
    return [f"{key}={run_dir.parent.parent / name / run_dir.name}" if name else key for key, _, name in split]


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
        if "loop=plain" in arguments:
            finished = train_plain(run_dir, arguments)
        elif "loop=select" in arguments:
            finished = train_selected(run_dir, arguments)
        else:
            with own_cache(run_dir / "cache"):
                finished = train_here(run_dir, arguments)
        shutil.rmtree(run_dir / "cache", ignore_errors=True)
        if not keep:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    figures = {"val": finished["best"] or finished["final"], "test": finished["test"]}
    found: dict[str, Any] = {split: {key: figures[split].get(key) for key in FIGURES} for split in figures}
    return {**found, "seconds": finished["total_seconds"]}


def quietly(command: Callable[[list[str]], int], arguments: list[str], folder: Path) -> None:
    """Run a command of distil_tl that writes to `folder`. Raises UserError with its output if it failed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = command(arguments)
    if status:
        raise UserError(f"{folder}: {command.__module__} ended with status {status}\n{said.getvalue()[-2000:]}")


def train_here(run_dir: Path, arguments: list[str]) -> dict[str, Any]:
    """summary.json of a run of distil_tl. Raises UserError if it failed."""
    quietly(train, [*arguments, f"run_dir={run_dir}"], run_dir)
    finished = read_summary(run_dir)
    assert finished is not None
    return finished


def own_cache(folder: Path) -> contextlib.AbstractContextManager[Any]:
    """A context in which features are computed anew, as the seconds of a run shall contain them."""
    return mock.patch.dict(os.environ, DISTIL_TL_CACHE=str(folder))


def train_selected(run_dir: Path, arguments: list[str]) -> dict[str, Any]:
    """summary.json of a run with the best.yaml of distil-tl select. Its seconds contain those of the selection.

    The selection is made once for all seeds of a task, in the folder `select` beside their runs, which use its cached
    features.
    """
    folder, seed = run_dir.parent / "select", next(word for word in arguments if word.startswith("seed="))
    for_select = [
        word for word in arguments if not word.startswith(("loop=", "model.name=", "data.image_size=", "seed="))
    ]
    with own_cache(run_dir.parent / "cache"):
        if not (folder / "best.yaml").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # with what an interrupted one has, its seconds would be too few
            shutil.rmtree(run_dir.parent / "cache", ignore_errors=True)
            quietly(select, [*for_select, "--out", str(folder)], folder)
        data = next(word for word in reversed(arguments) if word.startswith("data.root="))
        finished = train_here(run_dir, [str(folder / "best.yaml"), seed, data])
    selection = json.loads((folder / "select.json").read_text())
    return {**finished, "total_seconds": finished["total_seconds"] + selection["seconds"]}


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
