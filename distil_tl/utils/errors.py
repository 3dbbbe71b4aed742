"""Exceptions, exit codes, and words for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 3
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
    """The device ran out of memory while the ranks were reducing gradients: the process must start again.

    Attributes:
        settings: environment variables for the new process.
    """

    def __init__(self, message: str, settings: dict[str, str]) -> None:
        super().__init__(message)
        self.settings = settings


class SupersededError(RuntimeError):
    """A newer process took over the run, so this one must not write any more: exit status 1."""


class NoProgressError(RuntimeError):
    """A job was restarted several times without making progress: exit status 1."""


class WriteError(OSError):
    """A file of the run could not be written; files saved before are unchanged: exit status 1."""


class CheckpointError(WriteError):
    """A checkpoint could not be written; older ones are unchanged."""


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is not finite; the weights are those before that step: exit status 1."""


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
