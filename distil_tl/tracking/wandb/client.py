"""The training's side of the tracking process: start it, restart it, and wait for it at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from distil_tl.tracking.wandb.task import GIVE_UP, SENT, Task
from distil_tl.utils.log import logger
from distil_tl.utils.processes import kill_tree

RETRY_SECONDS = 60.0
POLL_SECONDS = 0.02

# Not `-m`, which would search the working directory for the package first.
_START = """
import sys
sys.path[:] = [sys.argv[1], *filter(None, sys.path)]
from distil_tl.tracking.wandb.process import main
main()
"""


class WandbClient:
    """The tracking process of one run. No method raises or waits without a limit, even if the process fails or hangs.

    Args:
        quiet: log no warning; `reason` has it.

    Attributes:
        url: of the run at W&B, once it is known.
        reason: the first reason why W&B does not have everything.
    """

    def __init__(self, task: Task, *, quiet: bool = False) -> None:
        self._task, self._quiet = task, quiet
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self._output = b""
        self._gave_up = False
        self._waits_for = ""
        self.url: str | None = None
        self.reason: str | None = None
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        root = str(Path(__file__).resolve().parents[3])
        try:
            self._folder = tempfile.mkdtemp(prefix="wandb-")
            process = subprocess.Popen(
                [sys.executable, "-c", _START, root, self._folder], env={**os.environ, "TMPDIR": self._folder},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._remove_folder()
            self._warn(f"the tracking process can't be started ({error})")
            return
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._process = process
        self._write_line(json.dumps(asdict(self._task)))

    def _write_line(self, text: str) -> None:
        """Write to the process, if there is one. Errors are ignored: `_exit_status` reports an exited process."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()

    def poll(self) -> None:
        """Log what the process reports. Restart it if it has exited, but at most once a minute."""
        self._read_output()
        if self._exit_status() is not None and not self._gave_up and time.monotonic() - self._started > RETRY_SECONDS:
            self._start()

    def end(self, status: str, seconds: float) -> bool:
        """Tell the process the status of the run, and wait for it. Returns whether all was sent in `seconds`."""
        deadline = time.monotonic() + seconds
        if self._exit_status() is not None and not self._gave_up:
            self._start()
        self._write_line(status)
        restarts = 1
        while time.monotonic() < deadline and not self._gave_up:
            exit_status = self._exit_status()
            if exit_status == SENT:
                return True
            if exit_status is not None:
                if restarts == 0:
                    break
                restarts -= 1
                self._start()
                self._write_line(status)
            self._read_output()
            time.sleep(POLL_SECONDS)
        if self._exit_status() is None and self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()
            self._remove_folder()
            why = f" ({self._waits_for})" if self._waits_for else ""
            self._warn(f"the tracking process did not finish within {seconds:g} s{why}")
        return False

    def _exit_status(self) -> int | None:
        """None while the process runs, -1 if none could be started. Warns if it failed."""
        if self._process is None:
            return -1
        exit_status = self._process.poll()
        if exit_status is not None:
            self._read_output()
            self._remove_folder()
            if exit_status != SENT:
                self._warn(f"the tracking process exited with status {exit_status}")
            self._gave_up = self._gave_up or exit_status == GIVE_UP
        return exit_status

    def _remove_folder(self) -> None:
        """Remove the temporary folder of the process that has ended. W&B leaves files, as it is killed in the end."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _read_output(self) -> None:
        """Handle the lines that the process has written: warnings, and the URL of the run."""
        if self._process is None or self._process.stdout is None:
            return
        with suppress(OSError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                self._output += part
        *lines, self._output = self._output.split(b"\n")
        for line in lines:
            kind, _, text = line.decode(errors="replace").partition(" ")
            if kind == "warn":
                self._warn(text)
            elif kind == "waits":
                self._waits_for = text
            elif kind == "url" and self.url is None:
                self.url = text
                logger.info("Weights & Biases: %s", text)

    def _warn(self, reason: str) -> None:
        """Log the first reason why W&B does not have everything."""
        if self.reason is not None:
            return
        self.reason = reason = reason.rstrip(". ")  # W&B's own messages are sentences
        if not self._quiet:
            logger.warning(
                "Weights & Biases does not have everything: %s. metrics.jsonl is complete; what is missing is sent "
                "when the run is resumed, or by python -m launch.sync %s", reason, self._task.run_dir,
            )  # fmt: skip
