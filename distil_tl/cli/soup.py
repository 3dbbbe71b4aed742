"""`distil-tl soup RUN_DIR... -o DIR`: the average of checkpoints, as a new run directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distil_tl.distributed.launch_env import refuse_several_processes
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import path_argument


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl soup",
        description="Average the weights of checkpoints of one model, trained once or several times on the same images "
        "(a greedy soup: Wortsman et al., 2022). From the best checkpoint on, each is added if the average is better "
        "on val with it. DIR is a run directory that evaluate, predict, export and load take like any other.",
        epilog="key=value changes the configuration of the runs, for example data.root=OTHER_FOLDER or metric=loss.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="RUN_DIR", help="a run directory, for all of its checkpoints, or one checkpoint"
    )
    parser.add_argument("-o", "--output", type=path_argument, required=True, metavar="DIR", help="a new folder")
    options = parser.parse_intermixed_args(args)
    return run_command("distil-tl soup", lambda: run(options.paths, options.output))


def run(arguments: Sequence[str], output: Path) -> None:
    """Write the soup to `output`.

    Args:
        arguments: run directories, checkpoints, and `key=value`.

    Raises:
        UserError: fewer than two checkpoints, checkpoints that can't be averaged, or an output that can't be written.
    """
    refuse_several_processes("distil-tl soup")
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    try:
        paths = [path_argument(argument) for argument in arguments if argument not in overrides]
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from None
    from distil_tl.cli.soups import make_soup  # imports torch, which takes seconds; --help does not need it

    make_soup(paths, overrides, output)


if __name__ == "__main__":
    sys.exit(main())
