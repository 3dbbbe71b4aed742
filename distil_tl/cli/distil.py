"""`distil-tl distil RUN_DIR model.name=NAME`: train another model as a student of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_tl.cli.derived_run import read_arguments, train_derived
from distil_tl.report.load import mapping
from distil_tl.utils.args import read_yaml
from distil_tl.utils.command import exit_process, run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.run_folders import refuse_other_than_run


def main(args: Sequence[str] | None = None) -> int:
    options = read_arguments(
        args,
        "distil-tl distil",
        "Train a student: another model, which learns from the outputs of the best checkpoint of RUN_DIR and from the "
        "labels, with the configuration, images and split of that run.",
        "the configuration: stages.full.distill.alpha=0.9, stages.full.epochs=20, run_dir=FOLDER",
        run_dir="the run directory of the teacher",
        needed="model.name=NAME",
    )
    return run_command("distil-tl distil", lambda: run(options.run_dir, options.overrides, options.config))


def run(run_dir: Path, overrides: Sequence[str], config_file: Path | None) -> None:
    """Train the student, or write its configuration to `config_file`.

    Raises:
        UserError: no such run, no model for the student, or what training refuses.
    """
    train_derived(student(run_dir, overrides), overrides, run_dir, config_file)


def student(run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a student of a run: that of the run, with the section `model` at its defaults.

    Each stage learns from the run, but for one that searches or fits heads, which are chosen by the labels.

    Raises:
        UserError: no such run, no model for the student, or no stage that can learn from a teacher.
    """
    refuse_other_than_run(run_dir)
    if not any(argument.startswith("model.name=") for argument in overrides):
        raise UserError("say which model learns, as in model.name=resnet18")
    tree = read_yaml(run_dir / "config.yaml")
    stages = mapping(tree, "stages")
    taught = [stage for stage in stages.values() if stage.get("epochs") != 0 and not _searches_heads(stage)]
    if not taught:
        raise UserError(f"every stage of {run_dir} searches or fits heads; none can learn from a teacher")
    for stage in taught:  # whose own teacher may have been weights
        stage["distill"] = {**mapping(stage, "distill"), "teacher": str(run_dir), "model": None, "image_size": None}
    return {**tree, "model": {}, "run_dir": None, "resume": "auto"}


def _searches_heads(stage: dict[str, Any]) -> bool:
    """Whether heads are chosen by the labels."""
    search = mapping(stage, "search")
    return bool(search.get("lr") or search.get("weight_decay") or stage.get("head", "linear") != "linear")


if __name__ == "__main__":
    exit_process(main())
