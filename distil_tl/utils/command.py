"""How a command ends: its exit status, and what the person who started it gets to read."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from distil_tl.utils.errors import (
    EXIT_FAULT,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LostRanksError,
    NonFiniteError,
    NoProgressError,
    PreemptedError,
    SupersededError,
    UserError,
    WriteError,
)
from distil_tl.utils.log import logger

STUCK = "may be stuck in C++"  # the name of a thread that nobody waits for


def run_command(name: str, body: Callable[[], int | None]) -> int:
    """Run a command; its exit status is what `body` returns (None: 0), or what the exception that it raises means.

    0 done; 2 the user's input is wrong; 3 preempted and saved; 1 a fault. For an exception rank 0 prints one message;
    a fault that has no message of its own is logged with its traceback.
    """
    try:
        return body() or 0
    except UserError as error:
        _say(f"{name}: {error}", always=error.one_rank)
        return EXIT_USER_ERROR
    except PreemptedError as error:
        _say(f"{name}: {error}")
        return EXIT_PREEMPTED
    except (NonFiniteError, NoProgressError) as error:
        _say(f"{name}: {error}")
        return EXIT_FAULT
    except (LostRanksError, SupersededError, WriteError) as error:
        _say(f"{name}: {error}", always=True)
        return EXIT_FAULT
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        return 0
    except Exception:
        if not logger.handlers:
            raise
        logger.exception("%s: a fault", name)
        return EXIT_FAULT


def leave(status: int) -> NoReturn:
    """End the process with `status`, also when a thread that is named STUCK is left behind.

    Should its call return while Python takes itself down, the process aborts, with another status.
    """
    if all(thread.name != STUCK for thread in threading.enumerate()):
        sys.exit(status)
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # its reader has gone
                stream.flush()
    finally:
        os._exit(status)


def _say(message: str, *, always: bool = False) -> None:
    if always or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
