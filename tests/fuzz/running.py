"""Commands in this process with any arguments, and what must hold however they end."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from distil_tl.utils.log import logger

BOUND_S = 120.0  # seconds after which a command counts as hanging, on a busy machine too
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: they may change a terminal
TRACES = ("Traceback (most recent", "internal error")


class WorkBeginsError(BaseException):
    """Raised where a command begins its real work, as its arguments are accepted."""


class TooLongError(BaseException):
    """A command is not done after BOUND_S."""


@dataclass(frozen=True)
class End:
    """How a command ended. `status` is None where its work began."""

    status: int | None
    out: str
    err: str
    trace: str = ""


def work_begins(*args: object, **options: object) -> Any:
    raise WorkBeginsError


def run_main(main: Callable[[list[str]], int | None], args: list[str]) -> End:
    """Run the `main` of a command with its output kept, for at most BOUND_S."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", rule) for rule in ("strict", "backslashreplace"))
    status, trace = None, ""
    logger.handlers.clear()  # of the command before, as in a new process
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded():
        try:
            status = main(args) or 0
        except WorkBeginsError:
            pass
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else -1
        except TooLongError:
            trace = f"not done after {BOUND_S} s: {traceback.format_exc()}"
        except KeyboardInterrupt:
            raise
        except BaseException:
            trace = traceback.format_exc()
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "backslashreplace"))
    return End(status, texts[0], texts[1], trace)


@contextlib.contextmanager
def bounded(seconds: float = BOUND_S) -> Iterator[None]:
    """Raise TooLongError in the body after `seconds`. pytest-timeout has a timer of the same kind, which goes on."""

    def ring(number: int, frame: object) -> None:
        raise TooLongError

    handler = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (time.monotonic() - began)), again)


def in_child(body: Callable[[], str]) -> str:
    """The fault that `body` returns in a process of its own, which may crash or hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(int(BOUND_S))
            with os.fdopen(writer, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(body())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as file:
        fault = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return fault or (f"the process ended with {code}" if code else "")


def fault_of(end: End, *, plain: bool = True) -> str:
    """What is wrong with how a command ended; empty if nothing is.

    Args:
        plain: whether its messages must hold no control characters.
    """
    if end.trace:
        return f"an exception: {end.trace}"
    if end.status not in (None, 0, 1, 2):
        return f"exit status {end.status}"
    for word in TRACES:
        if word in end.err + end.out:
            return f"{word!r} in the output: {end.err}{end.out}"
    if end.status and not (end.err + end.out).strip():
        return f"exit status {end.status} without a message"
    if plain and CONTROL.search(end.err + end.out):
        return f"control characters in {end.err + end.out!r}"
    return ""


class Faults:
    """The different faults that many examples have shown, each with its shortest example."""

    def __init__(self) -> None:
        self.examples = 0
        self.found: dict[str, tuple[int, str, str]] = {}
        self.statuses: Counter[int | None] = Counter()

    def add(self, example: object, fault: str) -> None:
        """Count an example. `fault` is empty if it showed none."""
        self.examples += 1
        if not fault:
            return
        where = re.findall(r'File ".*?((?:distil_tl|launch)/[^"]*)", line (\d+)', fault)
        last = fault.strip().splitlines()[-1]
        kind = f"{where[-1] if where else ''} {re.sub('[^A-Za-z ]+', '', last)[:40]}"
        count, shown, _ = self.found.get(kind, (0, "", ""))
        shorter = not shown or len(repr(example)) < len(shown)
        self.found[kind] = (count + 1, repr(example), fault) if shorter else (count + 1, shown, self.found[kind][2])

    def see(self, end: End, example: object, fault: str | None = None) -> None:
        """Count an example by how it ended. `fault` is found by `fault_of` if it is None."""
        self.statuses[end.status] += 1
        self.add(example, fault_of(end, plain=False) if fault is None else fault)

    def refuse(self) -> None:
        """Fail with all faults, if there are any."""
        parts = [f"{count} times, for example {shown}:\n{fault}" for count, shown, fault in self.found.values()]
        statuses = ", ".join(f"{status}: {count}" for status, count in self.statuses.items())
        total = f"{self.examples} examples ({statuses})"
        assert not parts, f"{len(parts)} faults in {total}\n\n" + "\n\n".join(parts)
        sys.stdout.write(f"{total}\n")


def explore(
    strategy: st.SearchStrategy[Any], examples: int, body: Callable[[Any], tuple[End | None, str, object]]
) -> None:
    """Call `body` with this many examples, and report all faults.

    Few examples are always the same ones, so that a test does not fail by chance.

    Args:
        body: returns how the command ended, its fault, and how to show the example.
    """
    faults = Faults()

    def one(example: Any) -> None:
        end, fault, shown = body(example)
        faults.statuses[None if end is None else end.status] += 1
        faults.add(shown, fault)

    settings(
        max_examples=examples, deadline=None, database=None, derandomize=examples < 1000, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(one))()  # fmt: skip
    faults.refuse()


def replaced(*names: str) -> contextlib.ExitStack:
    """Functions, as module.name, that raise WorkBeginsError."""
    stack = contextlib.ExitStack()
    for name in names:
        stack.enter_context(mock.patch(name, work_begins))
    return stack


def snapshot(*roots: Path) -> dict[bytes, Any]:
    """Everything that a command could destroy below folders: kinds, permissions, contents, links."""
    found: dict[bytes, Any] = {}
    pending = [os.fsencode(root) for root in roots]
    while pending:
        path = pending.pop()
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            found[path] = None
            continue
        kind = status.st_mode >> 12
        content: Any = None
        if kind == 0o10:
            with open(path, "rb") as file:  # noqa: PTH123 - a path of bytes
                content = (status.st_mtime_ns, file.read())
        elif kind == 0o12:
            content = os.readlink(path)  # noqa: PTH115 - a path of bytes
        elif kind == 0o4:
            content = tuple(sorted(os.listdir(path)))  # noqa: PTH208 - a path of bytes
            pending += [os.path.join(path, name) for name in content]  # noqa: PTH118 - a path of bytes
        else:
            content = status.st_rdev
        found[path] = (status.st_mode, status.st_ino, content)
    return found
