"""Which job was to work in a run directory."""

from __future__ import annotations

import datetime
import json
import socket
from pathlib import Path
from typing import Any

from distil_tl.utils.files import write_json

RECORD = "submitted.json"
SWEEP = "sweep.json"  # of a whole sweep: its trials, and what they set; `earlier` ones are no longer in it


def record(run_dir: Path, job_id: str, cluster: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = {"job_id": job_id, "cluster": cluster, "host": socket.gethostname(), "time": now}
    write_json(run_dir / RECORD, found)


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """What `record` wrote, if it did."""
    try:
        found: dict[str, Any] = json.loads((run_dir / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"job_id", "cluster", "time"} <= found.keys() else None


def read_sweep_record(folder: Path) -> dict[str, Any] | None:
    """What a sweep's folder says about it, if it holds one."""
    try:
        found: dict[str, Any] = json.loads((folder / SWEEP).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and all(isinstance(found.get(key, {}), dict) for key in ("trials", "earlier"))
    return found if known and "trials" in found else None
