"""A real server that W&B's client talks to, openwandb, and runs that are struck while they are tracked by it."""

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

from distil_tl.tracking.wandb.process import descendants
from tests.helpers.ranks import free_port

KEY = "local" + 40 * "0"
# Unlike W&B's own servers, openwandb does not say what it has of a run that goes on. With this it does.
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
# It checks the key with each request, which takes a quarter of a second where hashes are as slow as they should be.
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
    environment: dict[str, str]  # for whatever is to be tracked by it

    def query(self, text: str, *values: object) -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(f"file:{self.data}/openwandb.db?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(text, values)]

    def run(self, run_dir: Path) -> dict[str, Any]:
        """The one run that the server has of a run directory."""
        (found,) = self.query("select * from runs where run_id = ?", (run_dir / "wandb-id").read_text())
        return found

    def steps(self, run_dir: Path, key: str = "train/loss") -> list[int]:
        """In the order in which they came."""
        run_id = (run_dir / "wandb-id").read_text()
        rows = self.query("select step from metrics where run_id = ? and key = ? order by id", run_id, key)
        return [row["step"] for row in rows]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def serving(host: str = "127.0.0.1", *, tells: bool = False) -> Iterator[Server]:
    """A server of its own; skips where openwandb is not installed."""
    pytest.importorskip("openwandb", reason="openwandb is not installed")
    pytest.importorskip("wandb", reason="wandb is not installed")
    memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # it commits each figure to disk, or what it takes for one
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
            deadline = time.monotonic() + 60
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
    """Processes that live on for longer than `wait` seconds and were started with `NAME=value` in their environment."""
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


# In a training.


def tracked(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def struck(environment: dict[str, str], run_dir: Path, step: int, what: str, server: int = 0) -> None:
    """Have something happen after a step, when all steps before it were handed to W&B."""
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
    """Such as "kill core": the training, W&B's own process, the mirror, both of them and the training, the server."""
    how, _, whom = what.partition(" ")
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "warn": signal.SIGUSR2, "end": signal.SIGTERM}[how]
    words = {pid: (Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in descendants(os.getpid())}
    cores = [pid for pid, line in words.items() if b"wandb-core" in line]
    mirrors = [pid for pid, line in words.items() if b"wandb_mirror" in line]
    assert cores, words
    assert mirrors, words
    me = [os.getpid()]
    for pid in {"server": [server], "core": cores, "mirror": mirrors, "all": cores + mirrors + me, "it": me}[whom]:
        os.kill(pid, number)
