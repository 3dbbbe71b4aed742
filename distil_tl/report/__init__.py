"""`distil-tl report RUN_DIR`: a run directory as one self-contained `report.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distil_tl.report.load import load_run
from distil_tl.report.page import render
from distil_tl.utils.command import run_command
from distil_tl.utils.files import write_atomic

__all__ = ["main", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files of the run and return its path.

    Works on a run in progress or one that failed; raises `UserError` when there is no metrics.jsonl.
    """
    path = Path(run_dir) / "report.html"
    write_atomic(path, str(render(load_run(Path(run_dir)))))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command: write the report and say where it is."""
    parser = argparse.ArgumentParser(
        prog="distil-tl report",
        description="Write RUN_DIR/report.html: one file, nothing loaded from elsewhere.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory (it holds metrics.jsonl)")
    run_dir = parser.parse_args(argv).run_dir

    def report() -> None:
        sys.stdout.write(f"{write_report(run_dir)}\n")

    return run_command("distil-tl report", report)
