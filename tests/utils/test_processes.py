"""Processes below another one."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.helpers.paths import ROOT

SCRIPT = """
import os, subprocess, sys
from distil_tl.utils.processes import kill_tree
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
kill_tree(os.getpid())
"""


def test_a_process_that_kills_its_tree_kills_itself_last() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", ended.stdout.strip()], capture_output=True, text=True, check=False
    )
    assert state.stdout.strip()[:1] in ("", "Z"), "the child is gone"
