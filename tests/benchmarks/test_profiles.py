"""The profile of a run has an entry for each part of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks import measure
from tests.helpers.arguments import WITHOUT_TIMM

PARTS = [
    "start, after the imports", "stage head, rest", "stage head, setup", "stage head, training",
    "stage head, evaluation", "stage full, rest", "stage full, setup", "stage full, training",
    "stage full, evaluation", "the end", "the end, evaluation",
]  # fmt: skip


# Which functions take longest depends on what else the machine does.
ALL_FUNCTIONS = """
import sys
from benchmarks import profiles
profiles.TOP = 10_000
sys.exit(profiles.main(sys.argv[1:]))
"""


def profiled(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALL_FUNCTIONS, *args],
        cwd=measure.ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_each_part_of_a_run_has_a_profile(small: list[str], tmp_path: Path) -> None:
    done = profiled(
        *small, WITHOUT_TIMM, f"run_dir={tmp_path}/run", "data.workers=1"
    )  # a loader process must not be profiled
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\*\*(.*)\*\*, [\d.]+ s:$", done.stdout, re.MULTILINE) == PARTS
    training, evaluation = (
        done.stdout.partition(f"**stage full, {part}**")[2].partition("\n**")[0] for part in ("training", "evaluation")
    )
    assert "run_backward" in training
    assert "run_backward" not in evaluation


def test_a_refused_configuration_has_no_profile() -> None:
    done = profiled("optim.nam=sgd")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean `name`?" in done.stderr
