"""Which of a run's attempts is the current one, so that one given up for dead can't write beside its successor.

A node that was cut off, or a process whose launcher was killed, goes on training and knows nothing of the attempt that
has replaced it. Each attempt signs `attempt.json` when it opens the run directory, and looks at it before it writes.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distil_tl.utils.errors import NoProgressError, SupersededError, UserError
from distil_tl.utils.files import write_json

FILE = "attempt.json"
FIELDS = {"token", "folder", "host", "pid", "process", "slurm_job_id", "restarts", "step", "stuck", "started_at"}
MAX_STUCK = 3  # automatic restarts in a row that may begin at one and the same step


class Attempt:
    """This process's claim on a run directory. Before `begin` there is none, and `check` finds nothing wrong.

    Args:
        run_dir: or another folder that one process at a time works in.
        file: where in it the claim is signed.
    """

    def __init__(self, run_dir: Path, file: str = FILE) -> None:
        self.path = run_dir / file
        self._signed: dict[str, Any] | None = None

    @property
    def token(self) -> str | None:
        """What tells this attempt from others; None before `begin`."""
        return None if self._signed is None else str(self._signed["token"])

    def refuse_if_in_use(self, environ: Mapping[str, str] = os.environ) -> None:
        """Look for a process of this machine that still trains here.

        Raises:
            UserError: naming it. Not when Slurm requeued the job: that replaces what is left of it.
        """
        other = read_attempt(self.path)
        if other is None or "ended_at" in other or other["pid"] == os.getpid():
            return
        if other["folder"] != _identity(self.path.parent):  # a copy of the directory where it trains
            return
        job, restarts = _slurm(environ)
        requeued = job is not None and other["slurm_job_id"] == job and other["restarts"] != restarts
        if not requeued and is_alive(other):
            raise UserError(
                f"{self.path.parent} is in use: process {other['pid']} of this machine has been training there since "
                f"{other['started_at']}. Wait for it, end it with `kill {other['pid']}`, or choose another run_dir"
            )

    def begin(self, step: int, environ: Mapping[str, str] = os.environ) -> None:
        """Make this attempt, which goes on from `step`, the current one.

        Raises:
            NoProgressError: Slurm restarted the job time and again, and it never got further than `step`.
        """
        job, restarts = _slurm(environ)
        before = read_attempt(self.path)
        stuck = 0
        if before is not None and restarts > 0 and before["step"] == step and before["restarts"] < restarts:
            stuck = before["stuck"] + 1
        if stuck > MAX_STUCK:
            raise NoProgressError(
                f"the job was restarted {stuck} times at step {step} and never got further, so this ends it; see "
                f"{self.path.parent / 'logs'} for why, or save more often with checkpoint.every_minutes. Submitting it "
                f"again starts the count anew"
            )
        self._signed = {
            "token": secrets.token_hex(8),
            "folder": _identity(self.path.parent),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "slurm_job_id": job,
            "restarts": restarts,
            "step": step,
            "stuck": stuck,
            "started_at": _now(),
        }
        write_json(self.path, self._signed)

    def check(self) -> None:
        """Raises SupersededError when another attempt has become the current one."""
        if self._signed is None:
            return
        current = read_attempt(self.path)
        if current is not None and current["token"] != self._signed["token"]:
            raise SupersededError(
                f"another attempt has gone on with {self.path.parent} since {current['started_at']} (process "
                f"{current['pid']} on {current['host']}), so this one, on {self._signed['host']}, ends and writes "
                f"nothing more"
            )

    def end(self) -> None:
        """Say that nobody trains here any more."""
        if self._signed is not None:
            self.check()
            write_json(self.path, {**self._signed, "ended_at": _now()})


def read_attempt(path: Path) -> dict[str, Any] | None:
    """What the current attempt signed; None where there is none, or none that can be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= FIELDS else None


def is_alive(signed: Mapping[str, Any]) -> bool:
    """Whether the process that signed runs on, as far as this machine can tell: never so of another one's."""
    return signed["process"] is not None and signed["process"] == _process(signed["pid"])


def _slurm(environ: Mapping[str, str]) -> tuple[str | None, int]:
    """The job, and how often it was started before."""
    return environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)


def _process(pid: int) -> str | None:
    """What tells a process from a later one of the same number, on this machine or another; None when it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot} {namespace} {fields[18]}"


def _identity(folder: Path) -> str:
    """What tells a directory of this machine from a copy of it, by whichever path."""
    status = folder.stat()
    return f"{status.st_dev}:{status.st_ino}"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
