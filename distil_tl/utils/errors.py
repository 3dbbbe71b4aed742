"""The ways a command ends other than well, and what each means to whoever started it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 3


class UserError(Exception):
    """The user's input is wrong: shown as one message without a traceback, exit status 2.

    The message names the thing that is wrong and the way out. `one_rank` says that other ranks may not have met it.
    """

    def __init__(self, message: str, *, one_rank: bool = False) -> None:
        super().__init__(message)
        self.one_rank = one_rank


class PreemptedError(BaseException):
    """A signal asked the run to stop; everything is saved and the same command goes on: exit status 3.

    No Exception, as KeyboardInterrupt is none: in start-up a signal raises it wherever the code happens to be, and a
    library that catches what befalls its download must not catch this.
    """


class LostRanksError(RuntimeError):
    """A collective failed because another rank ended or hangs: exit status 1."""


class SupersededError(RuntimeError):
    """Another attempt has gone on with the run, so this one may not write any more: exit status 1."""


class NoProgressError(RuntimeError):
    """A job was restarted time and again and got nowhere: exit status 1."""


class WriteError(OSError):
    """A file of the run could not be written; what was saved before is as it was: exit status 1."""


class CheckpointError(WriteError):
    """A checkpoint could not be written; those before it are as they were."""


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is no longer finite: a fault of the run, exit status 1, weights as they were before it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`", did you mean `x`?"` when something in `known` is close to `word`, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    if not near:
        return ""
    return ", did you mean " + " or ".join(f"`{name}`" for name in near) + "?"
