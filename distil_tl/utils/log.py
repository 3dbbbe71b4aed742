"""Log output: the console, one file per rank, progress bars and text tables."""

from __future__ import annotations

import io
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil_tl.utils.files import writing

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger("distil_tl")
LINE_SECONDS = 10.0  # after which long work says how far it is, where there is no bar


def printable(name: str | Path) -> str:
    """A name from the user's data, safe for one line of text: line breaks and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


class _RankFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        # A full disk would print a traceback for each line; the run reports the full disk itself, once.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # A file name that is not UTF-8 holds lone surrogates, which a stream can't encode.
        return super().format(record).encode("utf-8", "backslashreplace").decode()


def setup_console(is_main: bool) -> None:
    """Log rank 0 as plain lines to standard output, and only the errors of other ranks, to standard error."""
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal can show the name of every class
            stream.reconfigure(errors="backslashreplace")
    console = logging.StreamHandler(sys.stdout if is_main else sys.stderr)
    console.setLevel(logging.INFO if is_main else logging.ERROR)
    console.setFormatter(_Formatter("%(message)s"))
    logger.addHandler(console)


def add_rank_file(run_dir: Path, rank: int) -> Path:
    """Also append this rank's log to RUN_DIR/logs/rank-N.log, and return that path. A full disk later is no error.

    Raises:
        WriteError: the file can't be opened.
    """
    path = run_dir / "logs" / f"rank-{rank}.log"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise OSError("it is not a regular file")
        file = _RankFile(path, encoding="utf-8")
    file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    return path


class Progress:
    """Progress of long work on rank 0: a bar on a terminal, or lines in a log, which is not silent for long."""

    def __init__(self, label: str, total: int, *, done: int = 0, show: bool) -> None:
        self._bar: tqdm[Any] | None = None
        self._label = label
        self._show = show
        self._total, self._done, self._shown_at = total, done, time.monotonic()
        if show and sys.stderr.isatty():
            from tqdm import tqdm  # imported only for a bar, so that commands start sooner

            self._bar = tqdm(total=total, initial=done, desc=label, leave=False, dynamic_ncols=True)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif self._show and time.monotonic() - self._shown_at >= LINE_SECONDS:
            self.show(f"{self._done / max(1, self._total):.0%}")

    def show(self, text: str) -> None:
        """Show the latest figures: beside the bar, or as a line of the log."""
        self._shown_at = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            logger.debug("%s  %s", self._label, text)
        elif self._show:
            logger.info("%s  %s", self._label, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds as text, in the two largest units: `45 s`, `3 min`, `2 h 5 min`, `1 d 4 h`."""
    whole = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "", 60)):
        if whole >= size:
            rest = whole % size // part_size
            return f"{whole // size} {unit}" + (f" {rest} {part}" if rest and part else "")
    return f"{whole} s"


def table(rows: list[list[str]], header: list[str]) -> str:
    """A plain-text table: first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
