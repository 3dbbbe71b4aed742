"""`distil-tl prepare ROOT --out DIR --resize N`: a copy of an image folder that is faster to read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distil_tl.data.config import DataConfig
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import printable, setup_console


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl prepare",
        description="Copy an image folder with its large images made smaller, so that training reads it faster. "
        "If it is stopped, run the same command to resume.",
    )
    parser.add_argument(
        "root", type=path_argument, metavar="ROOT", help="a folder with train/CLASS/*.jpg; val and test as well"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR",
        help="the copy: a new or empty folder, or a copy to resume",
    )  # fmt: skip
    parser.add_argument("--resize", type=int, required=True, metavar="N", help="maximum shorter side in pixels")
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEGs, 1 to 100 (default: 95)")
    parser.add_argument("--extensions", nargs="+", default=[], metavar="EXT", help="files to read besides those of "
                        "ImageFolder, as in: --extensions heic avif")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all CPUs)")
    options = parser.parse_args(args)
    return run_command("distil-tl prepare", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Make the copy, or resume it, with the options that `main` has read.

    Raises:
        UserError: an option out of range, or an error of `copy_resized`.
        PreemptedError: Ctrl-C; what is written stays.
    """
    root, out = options.root.resolve(), options.out.resolve()
    problems = []
    if options.resize < 8:
        problems.append("--resize must be at least 8 pixels")
    if not 1 <= options.quality <= 100:
        problems.append("--quality must be 1 to 100")
    problems += [
        problem.replace("data.extensions", "--extensions")
        for problem in DataConfig(extensions=options.extensions).problems()
    ]
    if (options.workers or 0) < 0:
        problems.append("--workers must be at least 0")
    if out.is_relative_to(root) or root.is_relative_to(out):
        problems.append(f"--out {printable(options.out)} and {printable(options.root)} must not contain each other")
    if out.exists() and not out.is_dir():
        problems.append(f"--out {printable(options.out)} is not a folder")
    if problems:
        raise UserError("; ".join(problems))
    setup_console(True)
    from distil_tl.data.resized_copy import copy_resized  # imports torch, which takes seconds; --help does not need it

    copy_resized(
        root,
        out,
        resize=options.resize,
        quality=options.quality,
        workers=options.workers,
        extensions=options.extensions,
    )


if __name__ == "__main__":
    sys.exit(main())
