"""The console script: `distil-tl COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from distil_tl.utils.errors import EXIT_USER_ERROR, did_you_mean
from distil_tl.utils.version import __version__

COMMANDS = {
    "train": "run the staged schedule (the same as python -m distil_tl.train)",
    "evaluate": "exact figures of a checkpoint, on any number of ranks",
    "predict": "classes of images, files or folders, as CSV",
    "prepare": "a copy of an image folder with large images made smaller, to be read faster",
    "prefetch": "fetch and check the weights that a job will need, where there is a network",
    "report": "a run directory as one self-contained report.html",
}


def main(args: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"distil_tl {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        print(f"distil-tl: no command `{name}`{hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    module = name if name in ("train", "evaluate", "report") else f"cli.{name}"
    status: int = importlib.import_module(f"distil_tl.{module}").main(rest)
    return status


def usage() -> str:
    lines = [f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(["usage: distil-tl COMMAND ...", "", *lines, "", "distil-tl COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
