"""Exact metrics of a checkpoint: `python -m distil_tl.evaluate RUN_DIR [key=value ...]`, alone or under torchrun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil_tl import arguments
from distil_tl import config as configuration
from distil_tl.utils.command import exit_process, run_command

if __name__ == "__main__":  # before torch is imported, so that a wrong argument is refused in less than a second
    arguments.check_evaluation_arguments()

from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import ALL_EXTENSIONS
from distil_tl.data.source import ImageSource
from distil_tl.data.splits import open_split
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import init_distributed
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.inference import restore_model
from distil_tl.report.text import METRIC_NAMES
from distil_tl.training.console import evaluation_json, print_calibration
from distil_tl.training.evaluation import evaluate
from distil_tl.utils.files import json_text
from distil_tl.utils.intervals import plus_minus
from distil_tl.utils.log import logger, printable, setup_console, table
from distil_tl.utils.outputs import check_output, open_output


def main(args: Sequence[str] | None = None, program: str = "distil_tl.evaluate") -> int:
    """The command; `program` is how the user started it, with which messages begin."""
    return run_command(program, lambda: run(arguments.evaluation_parser(program).parse_intermixed_args(args)))


def run(options: argparse.Namespace) -> None:
    """Evaluate, print the metrics, and write them to a file if asked to.

    Args:
        options: as `arguments.evaluation_parser` defines them.

    Raises:
        UserError: there is no such run, checkpoint or split, or the split has classes that the model does not know.
    """
    launch = read_launch(os.environ)
    setup_console(launch.rank == 0)
    restored = restore_model(options.run_dir, options.checkpoint, without_table(options.overrides))
    config, model, split = restored.config, restored.model, options.split
    configuration.check_evaluation(config)
    with init_distributed(launch, config.distributed) as info:
        if options.json is not None:  # rank 0 writes it: on another node its folder may not exist
            on_rank_zero(info, "checking the output", lambda: check_json(options.json))
        index = open_split(info, config.data, split, restored.classes, options.run_dir)
        bad_images = BadImages(config.data.on_bad_image)
        source = ImageSource(info, config.data, {split: index}, model.preprocess, bad_images)
        network = restored.network(info.device)
        sampler = source.eval_batches(split)
        batches = source.batches(source.eval_loader(split, restored.image_size, sampler), split)
        result = evaluate(
            info, network, sampler.turns, batches, len(restored.classes),
            mistakes=options.mistakes, temperature=restored.temperature, show=True,
        )  # fmt: skip
        bad_images.refuse_none_usable(result.metrics.count, split, index)
        if not info.is_main:
            return
        content = evaluation_json(split, index, result)
        given = {"overrides": list(options.overrides)} if options.overrides else {}
        if options.json is not None:
            with open_output(options.json) as file:
                file.write(json_text({"checkpoint": restored.checkpoint.name, **given, **content}))
        title = " ".join([f"{restored.checkpoint.name} of {options.run_dir} on {split}", *options.overrides])
        print_metrics(title, content)


def check_json(path: Path) -> None:
    """Raises UserError if the metrics can't be written there."""
    check_output("--json", path, (), ALL_EXTENSIONS, earlier=(b'{\n  "checkpoint": ',))


def without_table(overrides: Sequence[str]) -> list[str]:
    """The overrides; if they name another folder of images, the table of the run does not belong to it."""
    keys = {override.partition("=")[0] for override in overrides}
    more = ["data.labels=null"] if "data.root" in keys and "data.labels" not in keys else []
    return [*overrides, *more]


def print_metrics(title: str, content: dict[str, Any]) -> None:
    """A table of the classes, and the overall metrics on one line."""
    columns = ("recall", "precision", "f1")
    rows = [
        [printable(row["class"]), str(row["n"]), *("-" if row[k] is None else f"{row[k]:.4f}" for k in columns)]
        for row in content["per_class"]
    ]
    logger.info("\n%s\n", table(rows, ["class", "n", "recall", "precision", "F1"]))
    shown = [f"{name} {plus_minus(content[key], content['intervals'].get(key))}" for key, name in METRIC_NAMES.items()]
    logger.info(
        "%s: %s, loss %.4f, n %d (\u00b1: half the width of the 95 %% interval)",
        title, ", ".join(shown), content["loss"], content["n"],
    )  # fmt: skip
    print_calibration(content["calibration"])


if __name__ == "__main__":
    exit_process(main())
