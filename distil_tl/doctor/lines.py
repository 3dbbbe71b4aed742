"""The result of the checks: lines, each with a status, as text or as JSON."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from distil_tl.utils.errors import UserError
from distil_tl.utils.log import printable
from distil_tl.utils.threads import CallTimeoutError, call_with_timeout

OK, WARN, FAIL = "ok", "warn", "fail"
SHOW_AFTER_S = 2.0  # a check that takes longer is named on standard error


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Attributes:
        group: such as "GPUs"; the lines of a group stand together.
        name: what was checked.
        status: ok, warn or fail.
        text: what was found and, unless ok, how to correct it.
    """

    group: str
    name: str
    status: str
    text: str


@dataclass
class Report:
    """All lines, in the order in which they were added. With `show`, slow checks are named on standard error."""

    lines: list[Line] = field(default_factory=list)
    show: bool = False

    def add(self, group: str, name: str, status: str, text: str) -> None:
        self.lines.append(Line(group, name, status, text))

    def ok(self, group: str, name: str, text: str) -> None:
        self.add(group, name, OK, text)

    def warn(self, group: str, name: str, text: str) -> None:
        self.add(group, name, WARN, text)

    def fail(self, group: str, name: str, text: str) -> None:
        self.add(group, name, FAIL, text)

    def per_rank(self, group: str, name: str, results: Mapping[int, tuple[str, str]], of: int = 0) -> None:
        """Add one line for each different (status, text), with the ranks that have it unless all have.

        Args:
            of: the number of ranks, where some may have no result.
        """
        ranks_of: dict[tuple[str, str], list[int]] = {}
        for rank, result in sorted(results.items()):
            ranks_of.setdefault(result, []).append(rank)
        for (status, text), ranks in ranks_of.items():
            self.add(
                group, name, status, text if len(ranks) >= max(of, len(results)) else f"{name_ranks(ranks)}: {text}"
            )

    def drop_repetitions(self, first: str) -> None:
        """Keep one failing line for a fault that several checks have found: that of the group `first`, if it has one.

        The group `run` comes last, as it asks training, which stops at what other checks name more exactly.
        """
        fails = [line for line in self.lines if line.status == FAIL]
        by_first = {_subject(line) for line in fails if line.group == first}
        by_others = {_subject(line) for line in fails if line.group != "run"}
        self.lines = [
            line for line in self.lines if line.status != FAIL or line.group == first
            or _subject(line) not in (by_others if line.group == "run" else by_first)
        ]  # fmt: skip

    def count(self, status: str) -> int:
        return sum(line.status == status for line in self.lines)

    @property
    def works(self) -> bool:
        return self.count(FAIL) == 0


def _subject(line: Line) -> str:
    """The configuration key that a line is about; else its text."""
    if line.group == "GPUs" and line.name == "device":
        return "distributed.device"
    if "." in line.name or line.name == "run_dir":
        return line.name
    found = re.match(r"(?:[a-z_]+\.)*[a-z_]+(?==|:| is )", line.text)
    return line.text if found is None else found.group()


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks as text: `rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def guarded(report: Report, group: str, name: str, seconds: float, check: Callable[[Report], None]) -> None:
    """Add the lines of a check. One that fails in an unforeseen way or takes too long becomes a failing line.

    The lines that it added before are kept.
    """
    found = Report()
    try:
        with named_if_slow(f"checking {group}, {name} (at most {seconds:g} s)", show=report.show):
            call_with_timeout(seconds, lambda: check(found))
    except CallTimeoutError:
        found.fail(group, name, f"did not end within {seconds:g} s, and was given up")
    except UserError as error:
        found.fail(group, name, str(error))
    except Exception as error:
        found.fail(group, name, f"could not be checked: {type(error).__name__}: {first_line(error)}")
    report.lines += list(found.lines)


@contextmanager
def named_if_slow(what: str, *, show: bool) -> Iterator[None]:
    """Write to standard error what is going on, if the block takes longer than `SHOW_AFTER_S`."""

    def write() -> None:
        sys.stderr.write(f"distil-tl doctor: {what}\n")
        sys.stderr.flush()

    timer = threading.Timer(SHOW_AFTER_S, write)
    if show:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def alike(results: Mapping[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """The text of the first rank for all, if all have the same status: figures such as free memory differ a little."""
    first = results[min(results)] if results else (OK, "")
    same = all(status == first[0] for status, _ in results.values())
    return dict.fromkeys(results, first) if same else dict(results)


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "") or repr(error)


def as_text(report: Report, title: str) -> str:
    """The lines as a table with a heading for each group, and a summary at the end."""
    groups: dict[str, list[Line]] = {}
    for line in report.lines:
        groups.setdefault(line.group, []).append(line)
    width = max((len(line.name) for line in report.lines), default=0)
    parts = [title]
    for group, lines in groups.items():
        parts += ["", group]
        for line in lines:
            first, *more = line.text.split("\n")  # a message of several lines; a name from the data stays in its column
            parts.append(f"  {line.status:<4}  {line.name:<{width}}  {printable(first)}")
            parts += [" " * (width + 10) + printable(text) for text in more]
    return "\n".join([*parts, "", summary(report)])


def summary(report: Report) -> str:
    warnings = counted(report.count(WARN), "warning")
    if report.works:
        return "It will work." if not report.count(WARN) else f"It will work, with {warnings}."
    return f"It will not work: {counted(report.count(FAIL), 'failure')}, {warnings}."


def as_json(report: Report, title: str) -> dict[str, Any]:
    return {"title": title, "works": report.works, "lines": [asdict(line) for line in report.lines]}


def size(number: float) -> str:
    """Bytes as text, such as `64 MiB`."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:.0f} {unit}"
    return f"{number / 2**10:.3g} KiB"


def counted(number: int, word: str) -> str:
    """Such as `1 warning`, `no warnings`."""
    return f"{number or 'no'} {word}{'' if number == 1 else 'es' if word.endswith(('s', 'ch')) else 's'}"
