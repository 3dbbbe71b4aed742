"""`distil-tl report RUN_DIR`: the report of a run, one self-contained HTML file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from distil_tl.report.load import load_run
from distil_tl.report.page import render
from distil_tl.utils.command import run_command
from distil_tl.utils.files import write_atomic, writing
from distil_tl.utils.home import path_argument
from distil_tl.utils.outputs import check_output

__all__ = ["main", "write_report"]


def write_report(run_dir: Path, name: str | None = None) -> Path:
    """Write `run_dir/report.html` from the files of the run and return its path. The run may be in progress or failed.

    Args:
        name: of the run on the page; that of the folder, unless it will be renamed.

    Raises:
        UserError: there is no metrics.jsonl.
        WriteError: the report can't be written.
    """
    path = Path(run_dir) / "report.html"
    run = load_run(Path(run_dir))
    page = str(render(run if name is None else dataclasses.replace(run, name=name)))
    with writing(path):
        write_atomic(path, page)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command: write the report and print its path."""
    parser = argparse.ArgumentParser(
        prog="distil-tl report",
        description="Write RUN_DIR/report.html: one self-contained file, also for a run in progress.",
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="a run directory with metrics.jsonl")
    run_dir = parser.parse_args(argv).run_dir

    def report() -> None:
        if run_dir.is_dir():
            check_output("the report", run_dir / "report.html")
        sys.stdout.write(f"{write_report(run_dir)}\n")

    return run_command("distil-tl report", report)
