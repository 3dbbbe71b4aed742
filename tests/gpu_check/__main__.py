"""Runs the steps of tests/gpu_check.sh, each in a process of its own with a limit, and records their results.

torch is imported once. Steps are forked from this process, which never uses CUDA itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.utils.files import write_json
from tests.gpu_check.check import Check, CheckFailedError, write_to

SECONDS = 480.0  # for everything
DRY_SECONDS, DRY_LIMIT = 1200.0, 500  # for everything and for each step with --dry: machines of CI may be busy


@dataclass
class Result:
    """One step. `figures` are what it measured; `limit` is in seconds."""

    name: str
    status: str  # passed | failed | killed | skipped
    seconds: float
    limit: int
    last_line: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Running:
    name: str
    pid: int
    folder: Path
    limit: int
    began: float = field(default_factory=time.monotonic)


def main(args: list[str]) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="tests/gpu_check.sh", description="Checks this package on a GPU.")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with a tiny network, two steps at a time")
    parser.add_argument("--only", help="names of steps, separated by commas")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    options = parser.parse_args(args)
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    try:
        from tests.gpu_check.steps import STEPS
    except ModuleNotFoundError as error:
        sys.stderr.write(f"tests/gpu_check.sh: {error.name} is not installed; its first lines say how to add that\n")
        return 2

    names = options.only.split(",") if options.only else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"there is no step {', '.join(unknown)}; steps: {', '.join(STEPS)}")
    options.out = Path(os.environ.get("GPU_CHECK_FROM", ""), options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix="gpu-check-")  # not TemporaryDirectory, which each forked process would remove
    os.environ["DISTIL_TL_CACHE"] = f"{work}/cache"
    seconds = float(os.environ.get("GPU_CHECK_SECONDS") or (DRY_SECONDS if options.dry else SECONDS))
    results = Results(options.out, dry=options.dry, began=began, seconds=seconds)
    signal.signal(signal.SIGTERM, lambda number, frame: results.stop())
    try:
        run_steps(names, Path(work), results, dry=options.dry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return results.finish()


def run_steps(names: list[str], work: Path, results: Results, *, dry: bool) -> None:
    """Run the steps: one after another, or two at a time with `dry`. What is left when the time is over is skipped."""
    from tests.gpu_check.steps import STEPS

    waiting, running = list(names), list[Running]()
    if dry:  # the longest one first
        waiting.sort(key=lambda name: name != "compile")
    try:
        while waiting or running:
            over = results.is_over()
            while waiting and not over and len(running) < 1 + dry:
                name = waiting.pop(0)
                limit = DRY_LIMIT if dry else STEPS[name].limit
                running.append(start(name, Check(dry, work, work / name), limit))
            for step in list(running):
                pid, status = os.waitpid(step.pid, os.WNOHANG)
                late = not pid and (over or time.monotonic() - step.began > step.limit)
                if pid or late:
                    running.remove(step)
                    kill(step, reap=not pid)
                    results.add(
                        step, "killed" if late or os.WIFSIGNALED(status) else "passed" if status == 0 else "failed"
                    )
            while waiting and over:
                name = waiting.pop(0)
                results.skip(name, STEPS[name].limit)
            time.sleep(0.02)
    finally:
        for step in running:
            kill(step, reap=True)


def start(name: str, check: Check, limit: int) -> Running:
    """Fork a process for a step, as the leader of a session."""
    check.own.mkdir()
    pid = os.fork()
    if pid:
        return Running(name, pid, check.own, limit)
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.environ["GPU_CHECK_STEP"] = str(check.own)  # for `kill`: inherited by programs that the step starts
        output = os.open(check.own / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        write_to(output)
        status = run_step(name, check)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_step(name: str, check: Check) -> int:
    from tests.gpu_check.steps import STEPS

    figures: dict[str, Any] = {}
    try:
        text = STEPS[name].body(check, figures)
    except CheckFailedError as error:
        text = str(error)
        return 1
    finally:
        write_json(check.own / "figures.json", figures)
    sys.stdout.write(f"\n{text}\n")
    return 0


def kill(step: Running, *, reap: bool) -> None:
    """Kill all that is left of a step: its session, and programs in other sessions by their environment."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(step.pid, signal.SIGKILL)
    mark = f"GPU_CHECK_STEP={step.folder}\0".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
    if reap:
        os.waitpid(step.pid, 0)


class Results:
    """The lines on standard output, and the files log.txt and results.json."""

    def __init__(self, out: Path, *, dry: bool, began: float, seconds: float) -> None:
        self.out, self.dry, self.steps = out, dry, list[Result]()
        self.began, self.deadline = began, began + seconds
        (out / "log.txt").write_text("")
        self._write()

    def stop(self) -> None:
        """Let the time be over."""
        self.deadline = 0.0

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def skip(self, name: str, limit: int) -> None:
        """Record a step for which there is no time left."""
        self._record(Result(name, "skipped", 0.0, limit, "no time was left"))

    def add(self, step: Running, status: str) -> None:
        output = step.folder / "output"
        text = output.read_text(errors="replace") if output.exists() else ""
        if status == "killed":  # the output of its processes was not copied yet
            files = sorted(step.folder.glob("*.txt"), key=lambda path: path.stat().st_mtime)
            text += "".join(f"--- {path.name}\n{path.read_text(errors='replace')}\n" for path in files)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        figures = {}
        with contextlib.suppress(OSError, ValueError):
            figures = json.loads((step.folder / "figures.json").read_text())
        seconds = time.monotonic() - step.began
        last = lines[-1] if lines else "no output"
        self._record(Result(step.name, status, round(seconds, 1), step.limit, last, figures), text)
        shutil.rmtree(step.folder / "runs", ignore_errors=True)

    def _record(self, result: Result, text: str = "") -> None:
        self.steps.append(result)
        with (self.out / "log.txt").open("a") as log:
            log.write(f"=== {result.name}: {result.status}\n{text}\n")
        sys.stdout.write(f"{result.name:<22} {result.status:<7} {result.seconds:5.0f} s  {result.last_line[:160]}\n")
        sys.stdout.flush()
        self._write()

    def _write(self) -> None:
        seconds = round(time.monotonic() - self.began, 1)
        steps = [asdict(step) for step in self.steps]
        write_json(self.out / "results.json", {"dry": self.dry, "seconds": seconds, "steps": steps})

    def finish(self) -> int:
        bad = [step.name for step in self.steps if step.status != "passed"]
        verdict = f"not passed: {', '.join(bad)}" if bad else f"all {len(self.steps)} steps passed"
        sys.stdout.write(f"{verdict} in {time.monotonic() - self.began:.0f} s; {self.out}/results.json, log.txt\n")
        return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
