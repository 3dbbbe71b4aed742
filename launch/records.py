"""Which job was to work in a run directory."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from distil_tl.files import write_json

RECORD = "submitted.json"


def record(run_dir: Path, job_id: str, cluster: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json(run_dir / RECORD, {"job_id": job_id, "cluster": cluster, "time": now})


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """What `record` wrote, if it did."""
    try:
        found: dict[str, Any] = json.loads((run_dir / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "job_id" in found else None
