"""The code that a job runs is the code that was submitted, whatever is edited while it waits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from distil_tl.files import write_atomic
from distil_tl.rundir import git_state

PACKAGES = ("distil_tl", "launch")
SNAPSHOT = "snapshot.json"


def take_snapshot(target: Path) -> Path:
    """Copy the packages that run now to the folder `target`, in place of what is there, with the commit they are of."""
    source = Path(__file__).resolve().parents[1]
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(source / package, partial / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    write_atomic(partial / "distil_tl" / SNAPSHOT, json.dumps(git_state()) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target
