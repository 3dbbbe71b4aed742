"""A W&B-compatible server, openwandb, and faults in runs that it tracks."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distil_tl.utils.processes import descendants
from tests.helpers.ranks import free_port

KEY = "local" + 40 * "0"
# Unlike W&B's own servers, openwandb does not report which steps it has of a resumed run. With this it does.
TELLS = """
import json
from openwandb import graphql_schema, storage
plain = graphql_schema._run_to_type
def told(run):
    found = plain(run)
    folder = storage.get_run_files_dir(found._entity_name, found._project_name, found.name)
    lines = {}
    for name in ("history", "events"):
        path = folder / f"wandb-{name}.jsonl"
        lines[name] = [line for line in path.read_text().splitlines() if line] if path.exists() else []
    found.history_line_count, found.events_line_count, found.log_line_count = map(len, (*lines.values(), ()))
    found.history_tail, found.events_tail = (json.dumps(some[-1:]) for some in lines.values())
    found._config_json = json.dumps({"t": {}})
    return found
graphql_schema._run_to_type = told
"""
# It checks the key at each request, which takes 0.25 s with a secure hash. This hash is fast.
SERVE = """
import functools, bcrypt, openwandb.cli
bcrypt.gensalt = functools.partial(bcrypt.gensalt, rounds=4)
openwandb.cli.main(['serve'])
"""


@dataclass
class Server:
    url: str
    data: Path
    process: subprocess.Popen[bytes]
    environment: dict[str, str]  # of processes that it tracks

    def query(self, text: str, *values: object) -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(f"file:{self.data}/openwandb.db?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(text, values)]

    def run(self, run_dir: Path) -> dict[str, Any]:
        """The server's run of a run directory."""
        (found,) = self.query("select * from runs where run_id = ?", (run_dir / "wandb-id").read_text())
        return found

    def steps(self, run_dir: Path, key: str = "train/loss") -> list[int]:
        """The steps that have a figure, in the order of arrival."""
        run_id = (run_dir / "wandb-id").read_text()
        rows = self.query("select step from metrics where run_id = ? and key = ? order by id", run_id, key)
        return [row["step"] for row in rows]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def serving(host: str = "127.0.0.1", *, tells: bool = False) -> Iterator[Server]:
    """Start a server; skip the test if openwandb is not installed. With `tells` it reports the steps that it has."""
    pytest.importorskip("openwandb", reason="openwandb is not installed")
    pytest.importorskip("wandb", reason="wandb is not installed")
    # In memory, because the server commits each figure to disk.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        home, port = Path(folder), free_port()
        url = f"http://{host}:{port}"
        own = {"OPENWANDB_HOST": host, "OPENWANDB_PORT": str(port), "OPENWANDB_DATA_DIR": str(home / "data")}
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", (TELLS if tells else "") + SERVE],
                env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
        environment |= {f"WANDB_{kind}_DIR": str(home / kind) for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
        try:
            deadline = time.monotonic() + 240
            while not answers(url):
                assert process.poll() is None, (home / "log").read_text()
                assert time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.1)
            yield Server(url, home / "data", process, environment)
        finally:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


def with_variable(setting: str, wait: float = 20) -> list[str]:
    """Processes with `NAME=value` in their environment that still run after `wait` seconds."""
    deadline = time.monotonic() + wait
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if setting.encode() in path.read_bytes().split(b"\0"):
                    found.append(f"{path.parent.name}: {path.with_name('cmdline').read_bytes()[:80]!r}")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


# In the training process.


def tracked(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def struck(environment: dict[str, str], run_dir: Path, step: int, what: str, server: int = 0) -> None:
    """Let a fault occur after a step, when all earlier steps were given to W&B."""
    tracked(environment)
    tracker: Any = importlib.import_module("distil_tl.tracking.tracker").Tracker
    log = tracker.log

    def logged(self: Any, line: dict[str, Any]) -> None:
        log(self, line)
        if line["step"] == step and line["window"] == "interval":
            wait_for_step(run_dir, step - 1)
            strike(what, server)

    tracker.log = logged


def wait_for_step(run_dir: Path, step: int, mode: str = "*", timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not any(json.loads(path.read_text())["step"] >= step for path in run_dir.glob(f"wandb/{mode}.json")):
        assert time.monotonic() < deadline, f"W&B was not given step {step}"
        time.sleep(0.05)


def strike(what: str, server: int) -> None:
    """A fault such as "kill core": of the training ("it"), core (W&B's own process), tracking, all three, or server."""
    how, _, whom = what.partition(" ")
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "warn": signal.SIGUSR2, "end": signal.SIGTERM}[how]
    commands = {pid: (Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in descendants(os.getpid())}
    cores = [pid for pid, line in commands.items() if b"wandb-core" in line]
    tracking = [pid for pid, line in commands.items() if b"tracking.wandb.process" in line]
    assert cores, commands
    assert tracking, commands
    me = [os.getpid()]
    for pid in {"server": [server], "core": cores, "tracking": tracking, "all": cores + tracking + me, "it": me}[whom]:
        os.kill(pid, number)
