"""The tracking process: sends metrics.jsonl to W&B, so that no fault of W&B can affect the training.

It reads from disk, so it needs no queue and loses nothing: what W&B does not have is still there for the next attempt,
or for `launch.sync`. On standard input it receives a `Task` as one line, and at the end the status of the run as
another. On standard output it writes what the user should read. W&B's own output goes to RUN_DIR/logs/wandb.log.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from distil_tl.tracking.wandb.session import Report, Session
from distil_tl.tracking.wandb.task import GIVE_UP, RETRY, SENT, Task
from distil_tl.utils.processes import kill_descendants, kill_tree

POLL_SECONDS = 0.5  # between two reads of metrics.jsonl
ORPHAN_SECONDS = 10  # to send the rest after the training was killed


def track(task: Task, statuses: queue.Queue[str], report: Report) -> int:
    """Send rows until `statuses` has the status of the run. Returns SENT, RETRY or GIVE_UP.

    Args:
        report: receives warnings, and the URL of the run.
    """
    folder = Path(task.run_dir) / "wandb"
    folder.mkdir(exist_ok=True)
    with (folder / f"{task.mode}.lock").open("w", encoding="utf-8") as lock:
        # The process of an earlier attempt may send for as long as that attempt runs on a node that was cut off. The
        # training ends this one when it can't wait any longer.
        busy = "another process is sending this run"
        if not _locked(lock.fileno(), wait=False):
            if task.pid is None:
                report("warn", busy)
                return RETRY
            report("waits", busy)
            _locked(lock.fileno(), wait=True)
            report("waits", "")
        try:
            import wandb
        except Exception as error:
            report("warn", f"wandb can't be imported ({_one_line(error)})")
            return GIVE_UP
        permanent = tuple(getattr(wandb.errors, name, ()) for name in ("UsageError", "AuthenticationError"))
        try:
            session = Session(task, report)
            while True:
                try:
                    status = statuses.get(timeout=POLL_SECONDS)
                    break
                except queue.Empty:
                    session.follow()
            session.finish(status)
        except Exception as error:
            report("warn", _one_line(error))
            with suppress(OSError):  # the disk with the log may be full
                traceback.print_exc()
            return GIVE_UP if isinstance(error, permanent) else RETRY
    return SENT


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _locked(handle: int, *, wait: bool) -> bool:
    """Lock a file. False if another process holds the lock; with `wait` only once it does not.

    True where the system does not support locks.
    """
    import fcntl

    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not wait:
                return False
            time.sleep(0.2)
        except OSError:
            return True


def _wait_for_status(handle: int, statuses: queue.Queue[str]) -> None:
    """Read the status of the run. If the training exits without one, end this process soon, even if W&B hangs."""
    with open(handle, encoding="utf-8") as source:
        status = source.readline().strip()
    statuses.put(status or "killed")
    if not status:
        time.sleep(ORPHAN_SECONDS)
        shutil.rmtree(sys.argv[2], ignore_errors=True)  # its temporary folder, which the training would remove
        kill_tree(os.getpid())


def main() -> NoReturn:
    """The body of the process. It exits with the result of `track`."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2"):  # the training handles these
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Duplicates, so that W&B's processes inherit neither of the two pipes.
    source, answers = os.dup(0), os.fdopen(os.dup(1), "w", buffering=1)
    task = Task(**json.loads(_read_line(source)))
    _redirect_standard_streams(Path(task.run_dir) / "logs" / "wandb.log")

    def report(kind: str, text: str) -> None:
        with suppress(OSError):
            answers.write(f"{kind} {text}\n")

    statuses: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_wait_for_status, args=(source, statuses), daemon=True).start()
    exit_status = RETRY
    try:
        exit_status = track(task, statuses, report)
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        kill_descendants(os.getpid())  # W&B's exit handler would wait for its processes, and they for this one
        shutil.rmtree(sys.argv[2], ignore_errors=True)  # its temporary folder, if the training can't remove it
        os._exit(exit_status)


def _redirect_standard_streams(path: Path) -> None:
    """Standard input from /dev/null; all output is appended to a file."""
    path.parent.mkdir(exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard, other in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(other, standard)


def _read_line(handle: int) -> bytes:
    """Read one line and no byte more: another thread reads the rest."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(handle, 1)):
        line += byte
    return line
