"""`distil-tl predict RUN_DIR|MODEL.onnx PATH...`: predicted classes of images, files or whole folders, as CSV."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distil_tl.data.config import ALL_EXTENSIONS, MAX_WORKERS, SPLIT_FILE, SPLITS
from distil_tl.distributed.launch_env import refuse_several_processes
from distil_tl.export.names import ONNX
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, UserError
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import printable
from distil_tl.utils.outputs import check_output
from distil_tl.utils.run_folders import no_images, refuse_other_than_run

MAX_BATCH = 65_536  # images
EXCEL_BEGIN = b"\xef\xbb\xbfpath;prediction;"  # of the output with --excel


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl predict",
        description="Write a row for each image: path, prediction, probability, and an error if it can't be read.",
    )
    parser.add_argument(
        "model", type=path_argument, metavar="MODEL", help="a run directory, or an .onnx file of distil-tl export"
    )
    parser.add_argument("paths", type=path_argument, nargs="+", metavar="PATH", help="an image, or a folder to search")
    parser.add_argument("-o", "--output", type=path_argument, metavar="FILE", help="default: standard output")
    parser.add_argument("--checkpoint", default="best", help="best, last, or a folder in RUN_DIR/checkpoints")
    parser.add_argument("--format", choices=("csv", "jsonl"), help="default: by the name of FILE, else csv")
    parser.add_argument(
        "--excel",
        action="store_true",
        help="CSV for Excel where numbers have a decimal comma: with semicolons and a BOM",
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K most probable classes (default: 1)")
    parser.add_argument(
        "--split", choices=SPLITS, help="only images that the run, which divided them, has in this split"
    )
    parser.add_argument("--all", action="store_true", help="add the probability of each class")
    parser.add_argument(
        "--uncalibrated", action="store_true", help="probabilities without the temperature that was fitted on val"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images (default: 32)")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes (default: by the number of CPUs)")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if any file can't be read")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(args)
    return run_command("distil-tl predict", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Predict with the options that `main` has read. Returns the exit status.

    Raises:
        UserError: an option out of range, no such run or path, no image among the paths, or none that can be read.
    """
    refuse_several_processes("distil-tl predict")
    if options.batch_size < 1 or (options.workers or 0) < 0 or options.top < 1:
        raise UserError("--batch-size and --top must be at least 1, and --workers at least 0")
    if options.batch_size > MAX_BATCH or (options.workers or 0) > MAX_WORKERS:
        raise UserError(f"--batch-size must be at most {MAX_BATCH:,}, and --workers at most {MAX_WORKERS}")
    if options.output is not None:
        inputs, written = [options.model, *options.paths], (b"path,prediction,", EXCEL_BEGIN, b'{"path": ')
        check_output("--output", options.output, inputs, ALL_EXTENSIONS, earlier=written)
    if options.model.suffix == ONNX and options.checkpoint != "best":
        raise UserError(f"--checkpoint is for a run directory; {printable(options.model)} has one model")
    if options.model.suffix == ONNX and options.uncalibrated:
        raise UserError("--uncalibrated is for a run directory; for an ONNX file, give it to distil-tl export")
    if options.model.suffix != ONNX:
        refuse_other_than_run(options.model, options.paths)
    for problem in filter(None, map(no_images, options.paths)):
        raise UserError(problem)
    if options.split is not None and not (options.model / SPLIT_FILE).is_file():
        raise UserError(
            f"--split needs the {SPLIT_FILE} of a run that divided its images; {printable(options.model)} has none: "
            f"give the folder of the split"
        )
    by_name = "jsonl" if options.output is not None and options.output.suffix in (".jsonl", ".ndjson") else "csv"
    if options.excel and (options.format or by_name) != "csv":
        raise UserError("--excel is for CSV: remove it, or --format jsonl and the ending .jsonl")
    from distil_tl.cli.prediction_rows import RowFormat
    from distil_tl.cli.predictions import predict  # imports torch, which takes seconds; --help does not need it

    unreadable = predict(
        options.model,
        options.paths,
        checkpoint=options.checkpoint,
        calibrated=not options.uncalibrated,
        output=options.output,
        split=options.split,
        rows=RowFormat(options.format or by_name, options.top, options.all, options.excel),
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
    )
    return EXIT_FAULT if unreadable and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
