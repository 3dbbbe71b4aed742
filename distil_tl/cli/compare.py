"""`distil-tl compare RUN_DIR RUN_DIR`: two models on the same images, pair by pair."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distil_tl.data.config import ALL_EXTENSIONS, SPLITS
from distil_tl.distributed.launch_env import refuse_several_processes
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import path_argument
from distil_tl.utils.outputs import check_output


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl compare",
        description="Compare two runs on the same images: accuracy by class, images that only one of them classifies "
        "correctly, and whether the difference may be chance (McNemar's exact test).",
    )
    parser.add_argument("first", type=path_argument, metavar="RUN_DIR", help="a run directory with a checkpoint")
    parser.add_argument("second", type=path_argument, metavar="RUN_DIR", help="another one, with the same classes")
    parser.add_argument("--split", choices=SPLITS, default="val", help="of the first run's images (default: val)")
    parser.add_argument(
        "--data", type=path_argument, metavar="FOLDER", help="with the split (default: that of the first run)"
    )
    parser.add_argument("--checkpoint", default="best", help="best, last, or a folder in RUN_DIR/checkpoints")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write all results to FILE, with all images")
    parser.add_argument("--images", type=int, default=20, metavar="N", help="flipped images to list (default: 20)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(args)
    return run_command("distil-tl compare", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Compare with the options that `main` has read.

    Raises:
        UserError: an option out of range, no such run, checkpoint or split, or the runs have other classes.
    """
    refuse_several_processes("distil-tl compare")
    if options.images < 0:
        raise UserError("--images must be at least 0")
    if options.json is not None:
        check_output("--json", options.json, (), ALL_EXTENSIONS, earlier=(b'{\n  "first": ',))
    from distil_tl.cli.comparison import compare  # imports torch

    compare(
        (options.first, options.second),
        options.split,
        options.data,
        checkpoint=options.checkpoint,
        json_file=options.json,
        images=options.images,
        device=options.device,
    )


if __name__ == "__main__":
    sys.exit(main())
