"""Show the output of a run: `python -m launch.logs RUN [-f] [--rank N]`.

It is the output of the run's job, with that of its earlier attempts, or the log of a rank if launch did not submit it.
"""

from __future__ import annotations

import argparse
import sys
from codecs import getincrementaldecoder
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import open_regular
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import setup_console
from launch.job_output import output_files
from launch.records import read_record, read_sweep_record
from launch.run_status import RunStatus
from launch.status import ENDED, is_run, read_overview

POLL_S = 1.0  # between two reads of a file
ASK_S = 15.0  # between two questions whether a run without new output has ended


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.logs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=path_argument, help="a run directory")
    parser.add_argument("-f", "--follow", action="store_true", help="also wait for further output until the run ends")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="output of rank N (default: 0)")
    options = parser.parse_args(args)
    return run_command("launch.logs", lambda: show(options.dir.absolute(), options.rank, follow=options.follow))


def show(run_dir: Path, rank: int = 0, *, follow: bool = False) -> None:
    """Write the output of a rank to standard output; with `follow` until the run has ended.

    Raises:
        UserError: `run_dir` is not a run, or there is no such output.
    """
    setup_console(True)
    sweep = read_sweep_record(run_dir)
    if sweep is not None:
        example = next(iter(sweep["trials"]), "TRIAL")
        raise UserError(f"{run_dir} is a sweep; give the folder of a trial, such as {run_dir / example}")
    if not is_run(run_dir):
        raise UserError(f"{run_dir} is not a run directory")
    with suppress(KeyboardInterrupt):  # ends --follow
        copy(find_output(run_dir, rank, wait=follow), run_dir, follow=follow)


def find_output(run_dir: Path, rank: int, *, wait: bool) -> Path:
    """The file with the output of a rank; with `wait`, once the job has begun to write it.

    Raises:
        UserError: there is none, or the run has ended without it.
    """
    told = None
    while True:
        files = output_files(run_dir, read_record(run_dir))
        if rank in files:
            return files[rank]
        if files and not wait:
            ranks = ", ".join(map(str, files)) if len(files) < 10 else f"0 to {max(files)}"
            raise UserError(f"there is no output of rank {rank}, but of {ranks}")
        run = read_run(run_dir)
        why = f"{run_dir} is {run.state}{f' ({run.detail})' if run.detail else ''}"
        if not wait or run.state in ENDED:
            raise UserError(f"there is no output of rank {rank}: {why}")
        if why != told:
            sys.stderr.write(f"launch.logs: {why}; waiting for its output\n")
            told = why
        sleep(ASK_S)


def copy(path: Path, run_dir: Path, *, follow: bool) -> None:
    """Copy a file to standard output, and what is appended until the run ends."""
    asked, ended = monotonic(), False
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    with open_regular(path) as file:
        while True:
            text = file.read(65536)
            if text:
                sys.stdout.write(decoder.decode(text))
                sys.stdout.flush()
                asked = monotonic()
            elif not follow or ended:
                return
            elif monotonic() - asked >= ASK_S:
                ended, asked = read_run(run_dir).state in ENDED, monotonic()
            else:
                sleep(POLL_S)


def read_run(run_dir: Path) -> RunStatus:
    return read_overview(run_dir).rows[0][0]


if __name__ == "__main__":
    sys.exit(main())
