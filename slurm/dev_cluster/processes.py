"""Commands on this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

from dev_cluster.config import FailedError

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))  # su leaves sbin out


def execute(command: Sequence[object], timeout: float = 30) -> str:
    """Run a command and return its standard output.

    It gets its own pipes, because a daemon that it starts must not keep the pipes of this script open.

    Raises:
        FailedError: the exit status is not 0, or the command takes longer than `timeout` seconds.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, env={"PATH": PATH, "LC_ALL": "C"}, cwd="/", stdin=subprocess.DEVNULL, start_new_session=True,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FailedError(f"`{shlex.join(words)}` did not end in {timeout:.0f} s") from None
    if done.returncode != 0:
        raise FailedError(f"`{shlex.join(words)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
