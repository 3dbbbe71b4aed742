"""One submission at a time from a folder: a lock that the kernel releases when its last holder ends."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from distil_tl.utils.errors import UserError
from launch.executor import make_private_folder

FILE = "slurm/.submit.lock"
PATIENCE_S = 60.0  # another submission takes seconds; sbatch waits for a busy Slurm somewhat longer
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def submission_lock(folder: Path) -> Iterator[int]:
    """Hold the lock of a run directory or sweep; waits for another holder. Yields the descriptor of the lock file.

    A child process that inherits the descriptor holds the lock too: sbatch does, so that a job which is submitted
    just when its submitter is killed is in Slurm's queue before anyone else looks for it there.

    Raises:
        UserError: it is held for long.
        OSError: the file can't be written.
    """
    make_private_folder((folder / FILE).parent)
    descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _acquire(descriptor, folder)
        os.ftruncate(descriptor, 0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode(), 0)
        yield descriptor
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> None:
    deadline, told = monotonic() + PATIENCE_S, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            sys.stderr.write(
                f"launch: the file system of {folder} has no locks, so do not submit there twice at once\n"
            )
            return
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        if monotonic() > deadline:
            raise UserError(f"{holder} is submitting in {folder}; wait until it ends, or choose another folder")
        if not told:
            sys.stderr.write(f"launch: waiting for {holder}, which is submitting in {folder}\n")
            told = True
        sleep(0.1)
