"""Small files that tell which job was submitted for a run directory, and which trials belong to a sweep."""

from __future__ import annotations

import datetime
import json
import socket
from pathlib import Path
from typing import Any

from distil_tl.utils.files import write_json

RECORD_FILE = "submitted.json"  # of a run directory
SWEEP_FILE = "sweep.json"  # of a sweep: its trials and their values; `earlier` are trials that it no longer contains


def write_record(run_dir: Path, job_id: str, cluster: str) -> None:
    """Save which job was submitted for `run_dir`."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = {"job_id": job_id, "cluster": cluster, "host": socket.gethostname(), "time": now}
    write_json(run_dir / RECORD_FILE, record)


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The content of submitted.json; None if it is missing or incomplete."""
    record = read_json(run_dir / RECORD_FILE)
    return record if record is not None and {"job_id", "cluster", "time"} <= record.keys() else None


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
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
