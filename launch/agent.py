"""torchrun for batch scripts: `python -m launch.agent [OPTIONS OF TORCHRUN] -m launch.task ...`, once per node.

A signal that asks the run to stop goes to the workers alone. torchrun itself would die of USR2; at TERM it would kill
its workers after 30 seconds, while they still save. Slurm may send a signal to all processes of a node, or only to this
one, so it is passed on in any case; workers may get it twice. When the workers have ended, torchrun must not start them
again; nor when they refuse their input.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from os import kill
from pathlib import Path

from distil_tl.utils.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from distil_tl.utils.job_outcome import PREEMPTED, REFUSED, note, notes

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
POLL = 0.5  # seconds
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def main(args: Sequence[str] | None = None) -> int:
    """Run torchrun until it, or a stopped run, has ended. Returns its exit status, or 3, or 2."""
    command = [*TORCHRUN, *(sys.argv[1:] if args is None else args)]
    # torchrun inherits blocked signals. So do the workers, which have handlers for them after some seconds.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    torchrun = subprocess.Popen(command)
    while True:
        came = signal.sigtimedwait(SIGNALS, POLL)
        if came is not None:
            return _stop(torchrun, signal.Signals(came.si_signo))
        status = torchrun.poll()
        if status is not None:
            return 128 - status if status < 0 else status
        if notes()[-1:] == [REFUSED]:
            _end(torchrun)
            return EXIT_USER_ERROR


def _stop(torchrun: subprocess.Popen[bytes], number: signal.Signals) -> int:
    """Pass the signal on to the workers that run now, and end torchrun when they have ended."""
    workers = _children(torchrun.pid)
    if not workers:
        sys.stderr.write(f"launch: stopped by {number.name} before training started\n")
        note(PREEMPTED)
    while torchrun.poll() is None and not workers.isdisjoint(_children(torchrun.pid)):
        _send(workers, number)
        signal.sigtimedwait(SIGNALS, POLL)  # another signal asks for the same
    _end(torchrun)
    return EXIT_PREEMPTED


def _end(torchrun: subprocess.Popen[bytes]) -> None:
    """Kill torchrun, which can't start further workers then, and the workers."""
    torchrun.send_signal(signal.SIGSTOP)
    workers = _children(torchrun.pid)
    torchrun.kill()
    _send(workers, signal.SIGKILL)
    torchrun.wait()


def _send(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it has just ended
            kill(process, number)


def _children(parent: int) -> set[int]:
    """The processes that this one has started and that have not ended."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, its_parent, *_ = path.read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(its_parent) == parent and state not in "ZX":
                found.add(int(path.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
