"""`distil-tl init NAME`: copy a configuration, sweep file or batch script that comes with the package."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError, did_you_mean
from distil_tl.utils.home import path_argument
from distil_tl.utils.shipped import name_of, shipped_files


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl init",
        description="Copy a configuration, sweep file or batch script that comes with the package, to change it.",
        epilog="Configurations and sweep files can also be used by name, as in `distil-tl train resnet50 ...`.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="without it, the names are listed")
    parser.add_argument(
        "path", nargs="?", type=path_argument, metavar="FILE", help="the copy (default: in this folder)"
    )
    options = parser.parse_args(args)
    return run_command("distil-tl init", lambda: run(options.name, options.path))


def run(name: str | None, path: Path | None) -> None:
    """Copy the file, or list all of them.

    Raises:
        UserError: there is no such name, or the copy exists or can't be written.
    """
    files = shipped_files()
    if name is None:
        sys.stdout.write("\n\n".join(_listing(files)) + "\n")
        return
    file = files.get(name) or files.get(name.removesuffix(".yaml"))
    if file is None:
        hint = did_you_mean(name, files) or f"; the names are {', '.join(files)}"
        raise UserError(f"nothing of the name {name!r} comes with the package{hint}")
    target = path or Path(file.name)
    if target.is_dir():
        target /= file.name
    # The commands in its header. All in one pass, as the copy may be at the path that the file has in the repository.
    names = {name_of(path_of_other): other for other, path_of_other in files.items()} | {name_of(file): str(target)}
    pattern = "|".join(map(re.escape, names))
    text = re.sub(pattern, lambda found: names[found[0]], file.read_text(encoding="utf-8"))
    try:
        with target.open("x", encoding="utf-8") as copy:
            copy.write(text)
        if os.access(file, os.X_OK):
            target.chmod(target.stat().st_mode | 0o111)
    except FileExistsError:
        raise UserError(f"{target} exists already: give another name, distil-tl init {name} FILE") from None
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror}") from None
    sys.stdout.write(f"{target}: {summary(file)}\n")


def _listing(files: dict[str, Path]) -> list[str]:
    """The names by kind, each with its summary."""
    kinds = {"configs": "Configurations, for distil-tl train NAME and submit NAME:"}
    kinds |= {
        "recipes": "Recipes, for recipe=NAME:",
        "sweeps": "Sweep files, for distil-tl sweep NAME:",
        "site": "Profiles of clusters, for slurm.profile=FILE:",
    }
    kinds |= {"slurm": "Batch scripts, to copy with distil-tl init NAME:"}
    width = max(map(len, files))
    parts = []
    for folder, title in kinds.items():
        own = [f"  {name:<{width}}  {summary(file)}" for name, file in files.items() if file.parent.name == folder]
        parts += ["\n".join([title, *own])] if own else []
    return parts


def summary(file: Path) -> str:
    """The first sentence of the file's header."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")]
    first = re.match(r"(?:#.*\n)+", "\n".join(lines) + "\n")
    text = " ".join(line.lstrip("# ") for line in (first[0].splitlines() if first else []))
    return text.partition(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    sys.exit(main())
