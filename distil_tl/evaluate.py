"""`python -m distil_tl.evaluate RUN_DIR [key=value ...]`, alone or under torchrun: exact figures of a checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from distil_tl import config as configuration
from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import SPLITS
from distil_tl.data.device import to_device
from distil_tl.data.index import Index
from distil_tl.data.scan import scan
from distil_tl.data.splits import data_root, eval_batches, share_indexes
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import session
from distil_tl.inference import restore
from distil_tl.training.console import evaluation
from distil_tl.training.evaluation import evaluate
from distil_tl.training.network import ImageNetwork
from distil_tl.training.precision import usual_way
from distil_tl.utils.command import leave, run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_json
from distil_tl.utils.log import logger, printable, setup_console, table


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distil_tl.evaluate",
        description="Evaluate a checkpoint on a split, on any number of ranks with the same result.",
        epilog="key=value changes the run's configuration for this evaluation, such as data.root=OTHER_FOLDER.",
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--split", choices=SPLITS, default="val")
    parser.add_argument("--checkpoint", default="best", help="best, last, or a folder in RUN_DIR/checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, rank 0 alone")
    parser.add_argument(
        "--mistakes", type=int, default=50, metavar="N", choices=range(100_000), help="how many of the surest to keep"
    )
    return run_command("distil_tl.evaluate", lambda: run(parser.parse_intermixed_args(args)))


def run(options: argparse.Namespace) -> None:
    """Evaluate as `options` (see `main`) say, print the figures, and write them.

    Raises:
        UserError: no such run, checkpoint or split, or classes that the model does not know.
    """
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
    launch = read_launch(os.environ)
    setup_console(launch.rank == 0)
    restored = restore(options.run_dir, options.checkpoint, options.overrides)
    config = restored.config
    configuration.check_evaluation(config)
    with session(launch, config.distributed) as info:

        def work() -> dict[str, Index]:
            return {options.split: scan(data_root(config.data) / options.split, classes=restored.classes)}

        index = share_indexes(info, work)[options.split]
        network = ImageNetwork(
            restored.model, usual_way(restored.precision, restored.model.module, info.device), info.device
        ).fold(restored.image_size)
        loader = eval_batches(info, config.data, index, restored.model.preprocess, image_size=restored.image_size)
        bad_images = BadImages(config.data.on_bad_image)
        batches = bad_images.read(to_device(loader, info.device), options.split, index)
        result = evaluate(
            info,
            network,
            loader,
            batches,
            len(restored.classes),
            confusion=True,
            keep_mistakes=options.mistakes,
            show=True,
        )  # fmt: skip
        bad_images.refuse_none_left(result.metrics.count, options.split, index)
        if not info.is_main:
            return
        figures = evaluation(options.split, index, result)
        if options.json is not None:
            write_json(options.json, {"checkpoint": restored.checkpoint.name, **figures})
        columns = ("recall", "precision", "f1")
        rows = [
            [printable(row["class"]), str(row["n"]), *("-" if row[k] is None else f"{row[k]:.4f}" for k in columns)]
            for row in figures["per_class"]
        ]
        logger.info("\n%s\n", table(rows, ["class", "n", "recall", "precision", "F1"]))
        logger.info(
            "%s of %s on %s: top-1 %.4f, top-5 %.4f, macro-F1 %.4f, loss %.4f, n %d",
            restored.checkpoint.name, options.run_dir, options.split, figures["top1"], figures["top5"],
            figures["macro_f1"], figures["loss"], figures["n"],
        )  # fmt: skip


if __name__ == "__main__":
    leave(main())
