"""`distil-tl distil RUN_DIR model.name=NAME`: train another model as a student of a finished run."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distil_tl.data.config import ALL_EXTENSIONS
from distil_tl.report.load import mapping
from distil_tl.utils.args import read_yaml
from distil_tl.utils.command import exit_process, run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import path_argument
from distil_tl.utils.outputs import check_output, open_output
from distil_tl.utils.run_folders import refuse_other_than_run


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl distil",
        description="Train a student: another model, which learns from the outputs of the best checkpoint of RUN_DIR "
        "and from the labels, with the configuration, images and split of that run. Under torchrun: torchrun ... -m "
        "distil_tl distil ...",
        epilog="Further arguments change the configuration: stages.full.distill.alpha=0.9, stages.full.epochs=20, "
        "run_dir=FOLDER.",
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="the run directory of the teacher")
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="model.name=NAME, and others")
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="only write the configuration, to submit it"
    )
    options = parser.parse_intermixed_args(args)
    return run_command("distil-tl distil", lambda: run(options.run_dir, options.overrides, options.config))


def run(run_dir: Path, overrides: Sequence[str], config_file: Path | None) -> None:
    """Train the student, or write its configuration to `config_file`.

    Raises:
        UserError: no such run, no model for the student, or what training refuses.
    """
    content = yaml.safe_dump(student(run_dir, overrides), sort_keys=False, allow_unicode=True)
    if config_file is not None:
        check_output("--config", config_file, [run_dir / "config.yaml"], ALL_EXTENSIONS, earlier=())
        with open_output(config_file) as file:
            file.write(content)
        sys.stdout.write(f"{config_file}: submit it with distil-tl submit {' '.join([str(config_file), *overrides])}\n")
        return
    from distil_tl import config as configuration

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(content, encoding="utf-8")
        config = configuration.load([str(path), *overrides], saved=True)
    from distil_tl.train import train

    train(*config)


def student(run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a student of a run: that of the run, with the section `model` at its defaults.

    Each stage learns from the run, but for one that searches heads, which are chosen by the labels.

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
        raise UserError(f"every stage of {run_dir} searches heads; none can learn from a teacher")
    for stage in taught:
        stage["distill"] = {**mapping(stage, "distill"), "teacher": str(run_dir)}
    return {**tree, "model": {}, "run_dir": None, "resume": "auto"}


def _searches_heads(stage: dict[str, Any]) -> bool:
    search = mapping(stage, "search")
    return bool(search.get("lr") or search.get("weight_decay"))


if __name__ == "__main__":
    exit_process(main())
