"""What is written while a run goes on: metrics.jsonl always, Weights & Biases when asked."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from distil_tl.tracking.config import TrackingConfig, WandbConfig
from distil_tl.tracking.wandb.process import DONE, HOPELESS, Task, kill_tree
from distil_tl.utils.files import json_safe, write_atomic
from distil_tl.utils.log import logger

HURRIED_SECONDS = 10.0  # for W&B, when the training stops before its end: others wait for this process
RETRY_SECONDS = 60.0


class Tracker:
    """Rank 0's record of a run.

    Args:
        run_dir: holds metrics.jsonl.
        config: as it may be shown, without secrets.
        check: may object to a line by raising.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrackingConfig,
        config: dict[str, Any],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._config = config
        self._check = check
        self._file: TextIO | None = None
        self._mirror: Mirror | None = None

    @property
    def closed(self) -> bool:
        return self._file is None or self._file.closed

    def open(self, *, after_step: int = 0, within_epoch: bool = False) -> None:
        """Open metrics.jsonl, without the lines that a killed process wrote after its last checkpoint.

        Args:
            after_step: the step that the run resumes from; lines of later steps are removed.
            within_epoch: the epoch of that step is not evaluated yet, so its epoch lines are removed too.
        """
        path = self._run_dir / "metrics.jsonl"
        if path.exists():
            write_atomic(path, "".join(_lines_up_to(path, after_step, within_epoch)))
        self._file = path.open("a", buffering=1)
        if self._settings.wandb.mode != "disabled":
            task = wandb_task(self._run_dir, self._settings.wandb, self._config)
            self._mirror = Mirror(replace(task, pid=os.getpid()))

    def log(self, line: dict[str, Any]) -> None:
        """Write one line; `step`, `stage` and `split` are in it."""
        assert self._file is not None
        self._check()
        line = {**line, "time": time.time()}
        self._file.write(json.dumps(json_safe(line), allow_nan=False) + "\n")
        if self._mirror is not None:
            self._mirror.look()

    def close(self, status: str) -> None:
        """End it: the run is completed, preempted or failed, or another attempt has superseded this one."""
        if self._file is not None:
            with suppress(OSError):  # a line that did not fit; `log` has raised for it
                self._file.close()
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            patience = self._settings.wandb.finish_timeout_seconds
            mirror.end(status, patience if status == "completed" else min(patience, HURRIED_SECONDS))


def _lines_up_to(path: Path, step: int, within_epoch: bool) -> list[str]:
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
            too_late = within_epoch and found["step"] == step and found["window"] == "epoch"
            if found["step"] <= step and not too_late:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off, or a power cut left in pieces
            continue
    return kept


def wandb_task(run_dir: Path, settings: WandbConfig, config: dict[str, Any]) -> Task:
    """What W&B is to be told of a run. Its id is made when it is first asked for, and stays."""
    id_file = run_dir / "wandb-id"
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(4))
    given = asdict(settings)
    del given["finish_timeout_seconds"]
    name = settings.name or run_dir.resolve().name
    return Task(str(run_dir.resolve()), config=config, **{**given, "name": name})


# Not `-m`, which would look for the package in the working directory first.
_START = """
import sys
sys.path[:] = [sys.argv[1], *filter(None, sys.path)]
from distil_tl.tracking.config import TrackingConfig, WandbConfig
from distil_tl.tracking.wandb.process import main
main()
"""


class Mirror:
    """The process that repeats metrics.jsonl to Weights & Biases. Whatever it does, nothing here raises or hangs."""

    def __init__(self, task: Task, *, quiet: bool = False) -> None:
        self._task, self._quiet = task, quiet
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._hopeless = False
        self.url: str | None = None
        self.reason: str | None = None  # the first of why W&B does not get everything
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        root = str(Path(__file__).resolve().parents[2])
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, root],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._warn(f"no process can be started ({error})")
            return
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._process = process
        self._tell(json.dumps(asdict(self._task)))

    def _tell(self, text: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, as its status says
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()

    def look(self) -> None:
        """Pass on what the process has to say; bring it back when it has ended, but not more than once a minute."""
        self._listen()
        if self._status() is not None and not self._hopeless and time.monotonic() - self._started > RETRY_SECONDS:
            self._start()

    def end(self, word: str, seconds: float) -> bool:
        """Say how the training ended, and wait for what is left to be sent; whether it was."""
        deadline = time.monotonic() + seconds
        if self._status() is not None and not self._hopeless:
            self._start()
        self._say_word(word)
        again = True
        while time.monotonic() < deadline and not self._hopeless:
            status = self._status()
            if status == DONE:
                return True
            if status is not None:
                if not again:
                    break
                again = False
                self._start()
                self._say_word(word)
            self._listen()
            time.sleep(0.02)
        if self._status() is None and self._process is not None:
            kill_tree(self._process.pid)
            self._process.wait()
            self._warn(f"it did not finish within {seconds:g} s")
        return False

    def _say_word(self, word: str) -> None:
        if self._process is not None:
            self._tell(word)

    def _status(self) -> int | None:
        """None while the process runs; else how it ended, which is said when it was not well."""
        if self._process is None:
            return -1
        status = self._process.poll()
        if status is not None:
            self._listen()
            if status != DONE:
                self._warn(f"its process ended with status {status}")
            self._hopeless = self._hopeless or status == HOPELESS
        return status

    def _listen(self) -> None:
        if self._process is None or self._process.stdout is None:
            return
        with suppress(OSError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                self._heard += part
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            kind, _, text = line.decode(errors="replace").partition(" ")
            if kind == "warn":
                self._warn(text)
            elif kind == "url" and self.url is None:
                self.url = text
                logger.info("Weights & Biases: %s", text)

    def _warn(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            if self._quiet:
                return
            logger.warning(
                "Weights & Biases does not get everything: %s. metrics.jsonl has it all, and what is missing is sent "
                "when the run goes on, or by python -m launch.sync %s", reason, self._task.run_dir,
            )  # fmt: skip
