"""Exceptions, exit codes, and words for messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 3
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells have it
EXIT_RESTART = 4  # within a process only: a command replaces itself by a new process instead


class UserError(Exception):
    """The user's input is wrong: one message without a traceback, exit status 2.

    The message names what is wrong and how to correct it. With `one_rank`, other ranks may not have the same error, so
    this one prints it even if it is not rank 0.

    Attributes:
        rank_zero_ended: this rank has already waited until rank 0 had ended.
    """

    def __init__(self, message: str, *, one_rank: bool = False) -> None:
        super().__init__(message)
        self.one_rank = one_rank
        self.rank_zero_ended = False


class PreemptedError(BaseException):
    """A signal stopped the run; everything is saved, and the same command resumes it: exit status 3.

    A BaseException, as KeyboardInterrupt is: during start-up the signal handler raises it anywhere in the code, and a
    library that handles any Exception of a download must not catch it.
    """


class LostRanksError(RuntimeError):
    """Another rank exited or does not respond: exit status 1."""


class RestartError(Exception):
    """The process must start again: out of memory while the ranks reduced gradients, or a job that was suspended.

    Attributes:
        settings: environment variables for the new process.
    """

    def __init__(self, message: str, settings: dict[str, str]) -> None:
        super().__init__(message)
        self.settings = settings


class LoaderError(RuntimeError):
    """Images can't be loaded any more, because of the loader processes or the disk: exit status 1."""


class SupersededError(RuntimeError):
    """A newer process took over the run, so this one must not write any more: exit status 1."""


class NoProgressError(RuntimeError):
    """A job was restarted several times without making progress: exit status 1."""


class WriteError(OSError):
    """A file of the run could not be written; files saved before are unchanged: exit status 1."""


class CheckpointError(WriteError):
    """A checkpoint could not be written; older ones are unchanged."""


class ExportError(RuntimeError):
    """A model can't be exported, or the exported one answers otherwise: exit status 1."""


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is not finite; the weights are those before that step: exit status 1."""


def loader_fault(error: BaseException) -> str | None:
    """What happened to a loader process, and what to do, for an error of torch; None for other errors.

    torch raises it wherever the program is when the process ends.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in text:
        return None
    if "Bus error" in text:
        what = (
            "ended with a bus error, probably because /dev/shm or memory is full: give /dev/shm more space (docker run "
            "--shm-size=8g), or set data.workers=0"
        )
    elif "signal: Killed" in text:
        what = (
            "was killed, probably for lack of memory: request more memory, or set a smaller data.workers or "
            "data.prefetch_mib"
        )
    elif "killed by signal: " in text:
        name = text.rpartition("killed by signal: ")[2].partition(". ")[0]
        what = f"crashed ({name.rstrip('. ')}), perhaps in the decoder of an image: data.workers=0 may show which"
    else:
        what = "ended, for the reason above, or for lack of memory: data.workers=0 loads the images without it"
    return f"a loader process {what}. Run the same command to resume"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`", did you mean `x`?"` for the words of `known` that are close to `word`; an empty string if there are none."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    if not near:
        return ""
    return ", did you mean " + " or ".join(f"`{name}`" for name in near) + "?"


def listed(items: Sequence[str], limit: int) -> str:
    """The first `limit` items, and how many more there are."""
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


def number_hint(text: str) -> str:
    """How a number is written that was given as 20% or 0,2; empty for other texts."""
    if match := re.fullmatch(r"\s*(\d+(?:[.,]\d+)?)\s*%\s*", text):
        return f"; write {float(match[1].replace(',', '.')) / 100:g}"
    if re.fullmatch(r"\s*-?\d+,\d+\s*", text):
        return f"; write {text.strip().replace(',', '.')}"
    return ""
