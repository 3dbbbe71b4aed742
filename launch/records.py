"""Which job was to work in a run directory."""

from __future__ import annotations

import datetime
import json
import socket
from pathlib import Path
from typing import Any

from distil_tl.files import write_json

RECORD = "submitted.json"
SWEEP = "sweep.json"  # of a whole sweep: its trials, and what they set


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
