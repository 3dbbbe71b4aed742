"""Small files that tell which job was submitted for a run directory, and which trials belong to a sweep."""

from __future__ import annotations

import datetime
import os
import pwd
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.utils import files
from distil_tl.utils.files import write_json

RECORD_FILE = "submitted.json"  # of a run directory
SWEEP_FILE = "sweep.json"  # of a sweep: its trials and their values; `earlier` are trials that it no longer contains


OPEN_FOLDER = "slurm/.open"  # of a run directory or sweep: submissions whose records are not complete


@dataclass(frozen=True)
class Submission:
    """A submission to Slurm. It is written down before sbatch is called, and open until every run has its record.

    Attributes:
        folder: the run directory or sweep that is submitted.
        token: identifies its jobs in squeue.
        names: of the run directories in `folder`, in the order of the tasks; `.` is `folder` itself.
        summaries: of each run, when its old summary.json was written (ns); it is about the previous attempt.
        slurm_cluster: Slurm's name of the cluster; None if it was not known.
        job_id: of the job or array; None before sbatch has answered.
    """

    folder: Path
    token: str
    names: list[str]
    summaries: list[int | None]
    slurm_cluster: str | None
    job_id: str | None = None
    host: str = field(default_factory=socket.gethostname)
    user: str = field(default_factory=lambda: user_name())
    uid: int = field(default_factory=os.getuid)
    time: str = field(default_factory=lambda: _now())

    @property
    def path(self) -> Path:
        return self.folder / OPEN_FOLDER / f"{self.token}.json"

    def write(self) -> None:
        write_json(self.path, {**asdict(self), "folder": None})  # the folder may be moved

    def task_id(self, index: int, job_id: str) -> str:
        """The id of the job of one run."""
        return job_id if len(self.names) == 1 else f"{job_id}_{index}"

    def record(self, index: int, job_id: str) -> dict[str, Any]:
        """The content of one run's submitted.json."""
        own = {"slurm_cluster": self.slurm_cluster, "host": self.host, "user": self.user, "uid": self.uid}
        return {"job_id": self.task_id(index, job_id), "cluster": "slurm", **own, "time": self.time}


def read_open_submissions(folder: Path) -> list[Submission]:
    """The open submissions of a run directory or sweep; none if its files can't be read, as those of others."""
    found = []
    with suppress(OSError):
        for entry in sorted(os.scandir(folder / OPEN_FOLDER), key=lambda entry: entry.name):
            content = read_json(Path(entry.path)) if entry.name.endswith(".json") else None
            with suppress(TypeError):
                found.append(Submission(**{**(content or {}), "folder": folder}))
    return found


def find_open_submission(run_dir: Path) -> tuple[Submission, int] | None:
    """The open submission that a run is part of, by itself or as a trial, and its index there."""
    for folder, name in ((run_dir, "."), (run_dir.parent, run_dir.name)):
        for submission in read_open_submissions(folder):
            if name in submission.names:
                return submission, submission.names.index(name)
    return None


def write_record(run_dir: Path, job_id: str, cluster: str) -> None:
    """Save which job, not of Slurm, was submitted for `run_dir`."""
    own = {"host": socket.gethostname(), "user": user_name(), "uid": os.getuid()}
    write_json(run_dir / RECORD_FILE, {"job_id": job_id, "cluster": cluster, **own, "time": _now()})


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The job that was last submitted for a run: the content of submitted.json, or of an open submission.

    None if there is none, or the file is incomplete. Older records lack the user, who is then the file's owner.
    """
    found = find_open_submission(run_dir)
    if found is not None and found[0].job_id is not None:
        return found[0].record(found[1], found[0].job_id)
    record = read_json(run_dir / RECORD_FILE)
    if record is None or not all(isinstance(record.get(name), str) for name in ("job_id", "cluster", "time")):
        return None
    if not isinstance(record.get("uid"), int):
        record.pop("uid", None)
        with suppress(OSError):
            record["uid"] = (run_dir / RECORD_FILE).stat().st_uid
    return record


def has_started(run_dir: Path, record: Mapping[str, Any]) -> bool:
    """Whether the Slurm job of a run has begun, or may have: Slurm makes its output file then."""
    name = f"{record['job_id']}_0_log.out"
    try:
        return any((folder / "slurm" / name).exists() for folder in (run_dir, run_dir.parent))
    except PermissionError:  # the folder is private to who submitted
        return True


def user_name() -> str:
    """The name of the current user, or its number where it has none, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_sweep_record(folder: Path) -> dict[str, Any] | None:
    """The content of a sweep's sweep.json; None if it is missing or incomplete."""
    record = read_json(folder / SWEEP_FILE)
    if record is None or "trials" not in record:
        return None
    valid = all(isinstance(record.get(key, {}), dict) for key in ("trials", "earlier"))
    return record if valid else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing, incomplete or holds something else."""
    try:
        content: dict[str, Any] = files.read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
