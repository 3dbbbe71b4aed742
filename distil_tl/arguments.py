"""The arguments of the commands that import torch, so that they can be read before it is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distil_tl.config import Config, load
from distil_tl.config.checks import values_out_of_range
from distil_tl.data.config import SPLITS
from distil_tl.utils.args import explain, refuse, to_yaml
from distil_tl.utils.command import quick_imports, run_command
from distil_tl.utils.home import path_argument
from distil_tl.utils.run_folders import refuse_other_than_run


def usage(program: str) -> str:
    """Help: every key with its default and the comment beside it in the code."""
    lines = [f"usage: {program} [CONFIG.yaml] [key=value ...] [--print-config]", "", "Keys, defaults and meanings:", ""]
    lines += explain(Config(), "")
    return "\n".join(lines) + "\n"


def check_arguments(program: str, argv: Sequence[str]) -> None:
    """Print help or the configuration, or refuse arguments that can't be read, and exit; return otherwise.

    For use before torch is imported, which takes seconds; a call of `run_command` must follow.
    """
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(usage(called(program)))
        sys.exit(0)

    shows = "--print-config" in argv

    def read() -> None:
        config, schema = load([arg for arg in argv if arg != "--print-config"])
        if shows:
            refuse(list(values_out_of_range(config, without_model=True)))  # checks of models import torch
            sys.stdout.write(to_yaml(schema))

    status = run_command(program, read)
    if status or shows:
        sys.exit(status)
    quick_imports()


def called(program: str) -> str:
    """How a program is started: that of a module, or a command of distil-tl."""
    return f"python -m {program}" if program.startswith("distil_tl.") else program


def check_evaluation_arguments(argv: Sequence[str] | None = None, program: str = "distil_tl.evaluate") -> None:
    """The same for an evaluation; None: those of this process."""
    run_dir = evaluation_parser(program).parse_intermixed_args(argv).run_dir
    if status := run_command(program, lambda: refuse_other_than_run(run_dir)):
        sys.exit(status)
    quick_imports()


def evaluation_parser(program: str = "distil_tl.evaluate") -> argparse.ArgumentParser:
    """The arguments of `distil_tl.evaluate`, here so that they can be read before torch is imported."""
    found = argparse.ArgumentParser(
        prog=called(program),
        description="Evaluate a checkpoint on a split, with the same result on any number of ranks.",
        epilog="key=value changes the configuration for this evaluation, for example data.root=OTHER_FOLDER.",
    )
    found.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="a run directory with a checkpoint")
    found.add_argument("overrides", nargs="*", metavar="key=value")
    found.add_argument("--split", choices=SPLITS, default="val")
    found.add_argument("--checkpoint", default="best", help="best, last, or a folder in RUN_DIR/checkpoints")
    found.add_argument("--json", type=path_argument, metavar="FILE", help="write all results to FILE")
    found.add_argument("--mistakes", type=int, default=50, metavar="N", choices=range(100_000), help="how many to keep")
    return found
