"""`distil-tl prepare ROOT --out DIR`: a copy of images with a permanent split, smaller if asked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distil_tl.data.config import MAX_WORKERS, DataConfig, SplitConfig, has_splits, is_divided, root_problems
from distil_tl.distributed.launch_env import refuse_several_processes
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError, number_hint
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import printable, setup_console

DUPLICATES = "duplicates.csv"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl prepare",
        description="Copy images into a folder with train, val and test, from a folder with or without these or from a "
        "table, and list images that are in two of them. With --resize, large images are made smaller, so that "
        "training reads them faster. If it is stopped, run the same command to resume.",
    )
    split = SplitConfig()
    parser.add_argument(
        "root", type=path_argument, metavar="ROOT", help="a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with "
        "CLASS/*.jpg",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="OUT",
        help="the copy: a new or empty folder, or a copy to resume; or a new file *.csv: only a table of the split",
    )  # fmt: skip
    parser.add_argument("--resize", type=int, metavar="N", help="maximum shorter side in pixels (default: no change)")
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEGs, 1 to 100 (default: 95)")
    parser.add_argument("--labels", type=path_argument, metavar="FILE", help="a table with paths and labels")
    parser.add_argument("--val", type=share, default=split.val, metavar="SHARE", help="of each class for val, if there "
                        f"is no split (default: {split.val})")  # fmt: skip
    parser.add_argument("--test", type=share, default=split.test, metavar="SHARE", help="for test (default: none)")
    parser.add_argument("--group", metavar="GROUP", help="images to keep in one split: a column of the table, or a "
                        "regular expression on paths")  # fmt: skip
    parser.add_argument("--seed", type=int, default=split.seed, metavar="SEED", help="of the split (default: 0)")
    parser.add_argument("--no-duplicates", action="store_true", help="do not look for images that are in two splits")
    parser.add_argument("--extensions", nargs="+", default=[], metavar="EXT", help="files to read besides those of "
                        "ImageFolder, as in: --extensions heic avif")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all CPUs)")
    options = parser.parse_args(args)
    return run_command("distil-tl prepare", lambda: run(options))


def share(text: str) -> float:
    """A number on the command line."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number{number_hint(text)}") from None


def run(options: argparse.Namespace) -> None:
    """Make the copy, or resume it, with the options that `main` has read.

    Raises:
        UserError: an option out of range, images that can't be read or divided, or an error of `copy_resized`.
        PreemptedError: Ctrl-C; what is written stays.
    """
    refuse_several_processes("distil-tl prepare")
    root, out = options.root.resolve(), options.out.resolve()
    config = DataConfig(
        root=str(root),
        labels=None if options.labels is None else str(options.labels.resolve()),
        split=SplitConfig(options.val, options.test, options.group, options.seed),
        extensions=options.extensions,
    )
    only_table = out.suffix.lower() == ".csv" and not out.is_dir()
    problems = [*option_problems(options, config, root, out, only_table=only_table)]
    if problems:
        for name in ("val", "test", "group"):
            problems = [problem.replace(f"data.split.{name}", f"--{name}") for problem in problems]
        problems = [p.replace("data.extensions", "--extensions").replace("data.root=", "") for p in problems]
        raise UserError("; ".join(problems))
    setup_console(True)
    from distil_tl.cli.preparing import prepare  # imports torch, which takes seconds; --help does not need it

    duplicates = duplicates_beside(out) if only_table else out / DUPLICATES
    prepare(
        config, root, out,
        only_table=only_table, resize=options.resize, quality=options.quality,
        workers=options.workers, duplicates=None if options.no_duplicates else duplicates,
    )  # fmt: skip


def duplicates_beside(table: Path) -> Path:
    """Where duplicates are listed if only a table is written."""
    return table.with_name(f"{table.stem}.{DUPLICATES}")


def option_problems(
    options: argparse.Namespace, config: DataConfig, root: Path, out: Path, *, only_table: bool
) -> Iterator[str]:
    """What is wrong with the options, each in one message."""
    if options.resize is not None and options.resize < 8:
        yield "--resize must be at least 8 pixels"
    if not 1 <= options.quality <= 100:
        yield "--quality must be 1 to 100"
    yield from config.problems()
    if not 0 <= (options.workers or 0) <= MAX_WORKERS:
        yield f"--workers must be at least 0, and at most {MAX_WORKERS}"
    if only_table:
        if options.resize is not None:
            yield "--resize needs a folder for the copy: give --out DIR"
        if not is_divided(config, root):
            yield f"{printable(options.root)} has train and val already: give --out DIR"
        if out.exists():
            yield f"--out {printable(options.out)} exists: name a new file"
        elif not options.no_duplicates and duplicates_beside(out).exists():
            yield f"{printable(duplicates_beside(out))} exists, where duplicates are listed: name another table"
        elif not out.parent.is_dir():
            yield f"--out {printable(options.out)}: there is no folder {printable(out.parent)}"
    elif out.is_relative_to(root) or root.is_relative_to(out):
        yield f"--out {printable(options.out)} and {printable(options.root)} must not contain each other"
    if not only_table and out.exists() and not out.is_dir():
        yield f"--out {printable(options.out)} is not a folder"
    if config.labels is None and has_splits(root):
        if config.split != SplitConfig():
            yield f"{printable(options.root)} has splits already: --val, --test, --group and --seed have no effect"
    elif not config.problems():
        yield from root_problems(config, None)


if __name__ == "__main__":
    sys.exit(main())
