"""Tools for benchmarks: measured processes, a file of results that can be resumed, medians with ranges, tables."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distil_tl.rundir.directory import git_state
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic, write_json
from distil_tl.utils.threads import available_cpus

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Measured:
    """The cost of a process from its start to its end. `load` is the machine's one-minute load average before it."""

    began: float  # Unix time in seconds
    seconds: float
    cpu_seconds: float
    peak_mb: float  # MiB of resident memory, of the largest of its processes
    disk_mb: float  # MiB read from the disk because they were not in the page cache
    load: float


def end_on_sigterm() -> None:
    """Make SIGTERM raise SystemExit in this process, so that it terminates the processes that it started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_process(command: Sequence[str], env: Mapping[str, str], log: Path, timeout: float = 3600) -> Measured:
    """Run a command in its own process group, with its output in `log`, and wait for it.

    Raises:
        RuntimeError: it failed or took longer than `timeout` seconds. The message has the last lines of its output.
    """
    end_on_sigterm()
    load, began, clock = os.getloadavg()[0], time.time(), time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            usage = _wait(process, clock + timeout)
        except BaseException:
            _end(process)
            raise
    seconds = time.monotonic() - clock
    if usage is None or process.returncode:
        _end(process)
        problem = f"took longer than {timeout:.0f} s" if usage is None else f"failed with status {process.returncode}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} {problem}; its last output:\n{tail}")
    return Measured(
        began, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, usage.ru_inblock / 2048, load
    )


def _wait(process: subprocess.Popen[bytes], deadline: float) -> Any:
    """Wait for the process. Returns its resource usage, or None if it is still running at the deadline."""
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage
        time.sleep(0.01)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that is still running, and all its children."""
    if process.returncode is None:
        os.killpg(process.pid, 9)
        process.wait()


def environment(**more: str) -> dict[str, str]:
    """Environment variables for processes that import this checkout and print without buffering."""
    return {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


def interleaved(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """(round, name) in the order A B C, C B A, A B C, so that a drift of the machine affects all names alike."""
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            yield repeat, name


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 1) -> str:
        if self.n == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; None is shown as a dash."""
    lines = [list(header), ["---"] * len(header)]
    lines += [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> dict[str, Any]:
    """Hardware and versions, without the host name."""
    return {
        "cpu": _cpu_name(),
        "cpus": available_cpus(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "git": git_state(),
    }


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


class Results:
    """A JSON file that is saved after each measurement, so that the same command resumes with what is missing.

    `task` is everything that the results depend on.

    Raises:
        UserError: `path` has results of another task, machine or software version, or is not a file of results.
    """

    def __init__(self, path: Path, task: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        task = json.loads(json.dumps(task))
        self.content: dict[str, Any] = {"task": task, "machine": machine(), "found": {}, "runs": []}
        if path.exists() and not fresh:
            content = _read(path)
            if differing := [key for key in task if content["task"].get(key) != task[key]]:
                raise UserError(
                    f"{path} has results of another task (different: {', '.join(differing)}); give another --out, "
                    f"or --fresh to start again"
                )
            self.content = content
        self.commit = _short(git_state())
        self._refuse_another_machine(machine())
        path.parent.mkdir(parents=True, exist_ok=True)

    def _refuse_another_machine(self, here: dict[str, Any]) -> None:
        there = self.content["machine"]
        if differing := [key for key in ("cpu", "cpus", "gpu", "python", "versions") if there[key] != here[key]]:
            raise UserError(
                f"{self.path} was measured on another machine or with other software (different: "
                f"{', '.join(differing)}); give another --out, or --fresh to start again"
            )

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The saved value of `name`, or the result of `compute`, which is then saved."""
        if name not in self.content["found"]:
            self.content["found"][name] = compute()
            self.save()
        return self.content["found"][name]

    def has(self, name: str, repeat: int) -> bool:
        return any(run["name"] == name and run["repeat"] == repeat for run in self.content["runs"])

    def add(self, name: str, repeat: int, measured: Measured, **more: Any) -> None:
        run = {"name": name, "repeat": repeat, "commit": self.commit, **asdict(measured), **more}
        self.content["runs"].append(run)
        self.save()

    def of(self, name: str) -> list[dict[str, Any]]:
        return [run for run in self.content["runs"] if run["name"] == name]

    def save(self) -> None:
        write_json(self.path, self.content)

    def write_report(self, text: str) -> Path:
        """Write `text` to a .md file beside the JSON, below a line with the machine and the versions."""
        on = self.content["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in on["versions"].items() if number)
        head = f"{on['cpu']}, {on['cpus']} CPUs, {on['memory_gib']} GiB, GPU: {on['gpu'] or 'none'}; "
        commits = dict.fromkeys([_short(on["git"]), *[run.get("commit", "unknown") for run in self.content["runs"]]])
        path = self.path.with_suffix(".md")
        write_atomic(path, f"{head}Python {on['python']}, {versions}; commit {', '.join(commits)}.\n\n{text}")
        return path


def _short(git: dict[str, Any] | None) -> str:
    """The first ten digits of a commit, and `+` if files have changed since."""
    return "unknown" if git is None else git["commit"][:10] + ("+" if git["dirty"] else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if {"task", "machine", "found", "runs"} <= set(content):
            return content
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{path} is not a file of benchmark results; give another --out, or --fresh to replace it")
