"""A lock on the run directory: a stale process must not write to a run that a newer one took over.

A node that was cut off, or a process whose launcher was killed, keeps training and does not know that another process
has resumed its run. Each process signs `attempt.json` when it opens the run directory, and checks it before it writes.
"""

from __future__ import annotations

import datetime
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distil_tl.utils.errors import NoProgressError, SupersededError, UserError
from distil_tl.utils.files import read_json, write_json

FILE = "attempt.json"
# Of the fields that every such file has.
TYPES: dict[str, type | tuple[type, ...]] = {
    "token": str, "folder": str, "host": str, "pid": int, "process": (str, type(None)),
    "slurm_job_id": (str, type(None)), "restarts": int, "step": int, "stuck": int, "started_at": str,
}  # fmt: skip
MAX_STUCK = 3  # automatic restarts in a row that may begin at the same step


class Attempt:
    """The claim of this process on a run directory. There is none before `begin`; `check` then passes.

    Args:
        run_dir: or another folder that one process at a time may use.
        file: name of the lock file in it.
    """

    def __init__(self, run_dir: Path, file: str = FILE) -> None:
        self.path = run_dir / file
        self._signed: dict[str, Any] | None = None

    @property
    def token(self) -> str | None:
        """The identity of this attempt; None before `begin`."""
        return None if self._signed is None else str(self._signed["token"])

    def refuse_if_in_use(self, environ: Mapping[str, str] = os.environ) -> None:
        """Refuse a directory that another process of this machine is using.

        Raises:
            UserError: naming the process. Not raised when Slurm requeued the job: the new attempt replaces the old.
        """
        other = read_attempt(self.path)
        if other is None or "ended_at" in other or other["pid"] == os.getpid():
            return
        if other["folder"] != _identity(self.path.parent):  # this is a copy of the directory that it uses
            return
        job, restarts = _slurm(environ)
        requeued = job is not None and other["slurm_job_id"] == job and other["restarts"] != restarts
        if not requeued and is_alive(other):
            raise UserError(
                f"{self.path.parent} is in use: process {other['pid']} on this machine has been working there since "
                f"{other['started_at']}. Wait for it, end it with `kill {other['pid']}`, or choose another folder"
            )

    def begin(self, step: int, environ: Mapping[str, str] = os.environ) -> None:
        """Make this attempt, which starts from `step`, the current one.

        Raises:
            NoProgressError: Slurm restarted the job several times in a row without progress beyond `step`.
        """
        job, restarts = _slurm(environ)
        before = read_attempt(self.path)
        stuck = 0
        if before is not None and restarts > 0 and before["step"] == step and before["restarts"] < restarts:
            stuck = before["stuck"] + 1
        if stuck > MAX_STUCK:
            raise NoProgressError(
                f"the job was restarted {stuck} times at step {step} without progress, so it ends here; see "
                f"{self.path.parent / 'logs'} for the cause, or save more often with checkpoint.every_minutes. Submit "
                f"it again to reset this limit"
            )
        self._signed = {
            "token": secrets.token_hex(8),
            "folder": _identity(self.path.parent),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "slurm_job_id": job,
            "slurm_cluster": environ.get("SLURM_CLUSTER_NAME"),
            "uid": os.getuid() if hasattr(os, "getuid") else None,
            "restarts": restarts,
            "step": step,
            "stuck": stuck,
            "started_at": _now(),
        }
        write_json(self.path, self._signed)

    def check(self) -> None:
        """Raise SupersededError if another attempt is the current one."""
        if self._signed is None:
            return
        current = read_attempt(self.path)
        if current is not None and current["token"] != self._signed["token"]:
            raise SupersededError(
                f"another process took over {self.path.parent} at {current['started_at']} (process {current['pid']} on "
                f"{current['host']}), so this one, on {self._signed['host']}, stops and writes nothing more"
            )

    def end(self) -> None:
        """Release the directory."""
        if self._signed is not None:
            self.check()
            write_json(self.path, {**self._signed, "ended_at": _now()})


def read_attempt(path: Path) -> dict[str, Any] | None:
    """The content of a lock file; None if there is none, or it can't be read."""
    try:
        found: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return None
    valid = isinstance(found, dict) and all(isinstance(found.get(name, ...), kind) for name, kind in TYPES.items())
    if not valid:
        return None
    return found if isinstance(found.get("uid"), int) else {**found, "uid": None}


def is_alive(signed: Mapping[str, Any]) -> bool:
    """Whether the process that signed is running on this machine; False for a process of another machine."""
    return signed["process"] is not None and signed["process"] == _process(signed["pid"])


def can_be_checked(signed: Mapping[str, Any]) -> bool:
    """Whether `is_alive` tells that the process has ended: not of another machine, or another container of this one."""
    if signed["host"] != socket.gethostname():
        return False
    own, other = _process(os.getpid()), signed["process"]
    if own is None or not isinstance(other, str):
        return True
    (boot, namespace), (its_boot, its_namespace) = own.split(" ")[:2], [*other.split(" "), ""][:2]
    return its_boot != boot or its_namespace == namespace  # with another boot id, the machine has restarted since


def _slurm(environ: Mapping[str, str]) -> tuple[str | None, int]:
    """Job id and number of restarts."""
    return environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)


def _process(pid: int) -> str | None:
    """An identity that no other process has, on this machine or another, even with the same pid; None if it ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot} {namespace} {fields[18]}"


def _identity(folder: Path) -> str:
    """An identity of a directory that its copies do not have, independent of the path."""
    status = folder.stat()
    return f"{status.st_dev}:{status.st_ino}"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
