"""How a command ends: its exit status, and the message for an exception."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from distil_tl.utils.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_RESTART,
    EXIT_USER_ERROR,
    ExportError,
    LoaderError,
    LostRanksError,
    NonFiniteError,
    NoProgressError,
    PreemptedError,
    RestartError,
    SupersededError,
    UserError,
    WriteError,
    loader_fault,
)
from distil_tl.utils.home import provide_home
from distil_tl.utils.log import logger, printable
from distil_tl.utils.signals import STOP_SIGNALS
from distil_tl.utils.threads import has_abandoned_threads

# Only rank 0 prints a message that all ranks have. It exits first, because a launcher ends the others when one exits.
GIVE_WAY_SECONDS = 10.0

# At exit Python searches all objects for reference cycles. With torch imported this takes a third of the CPU time of a
# short command. Frozen objects are not searched.
atexit.register(gc.freeze)

# Read when torch is imported. Else torch prints a C++ stack trace when another rank has gone, beside our message.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


_WRONG_PATH = (errno.ENAMETOOLONG, errno.ELOOP)  # no file can have such a path: the user's input is wrong
_COMPILE_ERRORS = ("InductorError", "BackendCompilerFailed")
_RESTARTED = "DISTIL_TL_RESTARTED"  # of the environment: the id of the process that starts again


class _Imports:
    are_quick = False


class _Ended:
    because_of_others = False


def ended_because_of_others() -> bool:
    """Whether the last command of this process failed because another rank was lost, or another job took over."""
    return _Ended.because_of_others


def quick_imports() -> None:
    """Let no search for reference cycles interrupt the imports that follow, until the next `run_command`.

    An import only adds objects. To search all of them again and again takes a fifth of the time of importing torch.
    """
    _Imports.are_quick = True
    gc.disable()


def _end_quick_imports() -> None:
    """Search again, but never what was imported: it stays, and to search it would interrupt the training."""
    if _Imports.are_quick:
        _Imports.are_quick = False
        gc.freeze()
        gc.enable()


def run_command(name: str, body: Callable[[], int | None]) -> int:
    """Run a command; its exit status is what `body` returns (None: 0), or what the exception that it raises means.

    0 done; 2 the user's input is wrong; 3 preempted and saved; 130 Ctrl-C, with nothing to save; 1 a fault; 4 the
    caller must call `restart_process`.
    For an exception rank 0 prints one message; an unexpected exception is logged with its traceback.
    """
    _end_quick_imports()
    _Ended.because_of_others = False
    provide_home(show=_is_rank_zero())
    try:
        _refuse_deleted_folder()
        return body() or 0
    except UserError as error:
        _print_error(f"{name}: {error}", every_rank=error.one_rank)
        if not (_is_rank_zero() or error.one_rank or error.rank_zero_ended):
            time.sleep(GIVE_WAY_SECONDS)
        return EXIT_USER_ERROR
    except PreemptedError as error:
        _print_error(f"{name}: {error}")
        return EXIT_PREEMPTED
    except KeyboardInterrupt:  # where nothing is to be saved
        _print_error(f"{name}: stopped by Ctrl-C")
        return EXIT_INTERRUPTED
    except RestartError as error:
        _print_error(f"{name}: {error}")
        os.environ.update({**error.settings, _RESTARTED: str(os.getpid())})
        return EXIT_RESTART
    except (NonFiniteError, NoProgressError, ExportError) as error:
        _print_error(f"{name}: {error}")
        return EXIT_FAULT
    except (LoaderError, LostRanksError, SupersededError, WriteError) as error:
        _Ended.because_of_others = isinstance(error, (LostRanksError, SupersededError))
        _print_error(f"{name}: {error}", every_rank=True)
        return EXIT_FAULT
    except BrokenPipeError:  # the reader of standard output, such as `head`, has exited
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        return 0
    except Exception as error:
        if (known := _known_error(error)) is not None:
            message, status, every_rank = known
            logger.debug("%s: traceback", name, exc_info=True)
            _print_error(f"{name}: {message}", every_rank=every_rank)
            return status
        if not logger.handlers:
            raise
        logger.exception("%s: internal error", name)
        return EXIT_FAULT


def _refuse_deleted_folder() -> None:
    """Raises UserError if the current folder is gone: a relative path, and much in libraries, needs one."""
    try:
        Path.cwd()
    except OSError as error:
        raise UserError(
            f"the current folder does not exist any more, or can't be read ({error.strerror}): change to another one, "
            f"as with `cd`, and run the command there"
        ) from None


def _known_error(error: Exception) -> tuple[str, int, bool] | None:
    """The message for an error of torch or of the system, its exit status, and whether each rank has its own.

    Errors of torch are told by their names, as it is not imported here.
    """
    kind, first = type(error).__name__, str(error).partition("\n")[0]
    if "does not have a deterministic implementation" in str(error):
        operation = first.partition(",")[0]
        message = f"deterministic=true: {operation}; use deterministic=false, or another model"
        return message, EXIT_USER_ERROR, False
    if (fault := loader_fault(error)) is not None:
        return fault, EXIT_FAULT, True
    if kind in _COMPILE_ERRORS:
        return f"torch.compile failed: {first}. Correct that, or set compile=none", EXIT_USER_ERROR, True
    if kind == "OutOfMemoryError":
        remedy = "use a smaller model or image size, or a device with more free memory"
        return f"the device has too little memory; {remedy}. {first}", EXIT_USER_ERROR, True
    if isinstance(error, OSError) and error.filename is not None:  # a bug rarely names a file of the system
        status = EXIT_USER_ERROR if error.errno in _WRONG_PATH else EXIT_FAULT
        return f"{printable(error.filename)}: {error.strerror or error}", status, True
    return None


def exit_process(status: int) -> NoReturn:
    """End the process with `status`, also when a thread is abandoned in a call that does not return.

    If such a call returned while Python finalizes, the process would abort, with another exit status. A process that
    must start again does not end: see `restart_process`.
    """
    if status == EXIT_RESTART:
        restart_process()
    if not has_abandoned_threads():
        sys.exit(status)
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # its reader has exited
                stream.flush()
    finally:
        os._exit(status)


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def has_restarted() -> bool:
    """Whether this process has run the same command before, and starts it again."""
    return os.environ.get(_RESTARTED) == str(os.getpid())


def restart_process() -> NoReturn:
    """Replace this process by a new one with the same command.

    The process id stays the same, so the launcher does not notice. All memory is freed, on the GPU too. Signals wait
    until the new process has handlers for them.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has exited
            stream.flush()
    with suppress(OSError):  # not Linux
        for path in list(Path("/proc/self/fd").iterdir()):
            with suppress(OSError):  # the descriptor of the list itself
                os.set_inheritable(int(path.name), int(path.name) <= 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _print_error(message: str, *, every_rank: bool = False) -> None:
    """Print to standard error: on rank 0, or on every rank. The log of the rank has it, too."""
    logger.debug("%s", message)
    if every_rank or _is_rank_zero():
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
