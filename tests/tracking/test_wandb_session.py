"""One W&B run, with W&B's own client."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from distil_tl.tracking.config import WandbConfig
from distil_tl.tracking.wandb.state import segments
from distil_tl.tracking.wandb.task import wandb_task
from tests.helpers.metrics_lines import line

SEND = """
import json, os, sys
from distil_tl.tracking.wandb.session import Session
from distil_tl.tracking.wandb.task import Task
from distil_tl.utils.processes import descendants
session = Session(Task(**json.loads(sys.argv[1])), print)
session.finish("completed")
left = [pid for pid in descendants(os.getpid()) if b"wandb-core" in open(f"/proc/{pid}/cmdline", "rb").read()]
sys.stdout.flush()
os._exit(len(left))  # as the tracking process does, without W&B's exit handlers
"""


def test_the_segment_is_written_when_an_offline_run_ends(tmp_path: Path):
    """W&B's `finish` may return before its own process has written the rows, and the tracking process kills it."""
    pytest.importorskip("wandb")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2, 3)))
    task = wandb_task(tmp_path, WandbConfig(mode="offline"), {})
    done = subprocess.run(
        [sys.executable, "-c", SEND, json.dumps(asdict(task))], cwd=tmp_path, timeout=240, check=False
    )
    assert done.returncode == 0, "W&B's process still runs"
    (segment,) = segments(tmp_path)
    assert b"train/loss" in next(segment.glob("run-*.wandb")).read_bytes()
