"""What the steps of the GPU check share: runs of training in forked processes, and their results."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.images import make_folder
from tests.helpers.ranks import free_port


class CheckFailedError(Exception):
    """A step found something wrong; the message says what."""


def expect(condition: bool, problem: str) -> None:
    if not condition:
        sys.stdout.write(f"\n{problem}\n")
        raise CheckFailedError(problem)


@dataclass(frozen=True)
class Check:
    """One step.

    Attributes:
        dry: on the CPU, with a tiny network.
        work: a folder of all steps.
        own: a folder of this step.
    """

    dry: bool
    work: Path
    own: Path

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def run_dir(self, name: str) -> Path:
        return self.own / "runs" / name

    def arguments(self, name: str, *more: str) -> list[str]:
        """Of a run of two stages: the built-in digits with a ResNet-18, or a few images with a small network."""
        fixed = ["model.weights=none", "stages.head.epochs=1", "stages.full.epochs=2", f"run_dir={self.run_dir(name)}"]
        fixed += [f"distributed.device={self.device}"]
        if not self.dry:
            return [*fixed, "model.name=resnet18", *more]
        small = ["model.name=shufflenet_v2_x0_5", f"data.root={self.images(16)}", "data.image_size=32"]
        small += ["data.global_batch_size=8", "data.workers=0", "tracking.log_every=1", "data.augment=none"]
        return [*fixed, *small, *more]

    def images(self, count: int) -> Path:
        """A folder of a few small images, for `dry`."""
        folder = self.own / "images"
        if not folder.exists():
            make_folder(folder, {"train": count, "val": 8})
        return folder


def train(args: list[str]) -> int:
    from distil_tl.train import main

    return main(args)


def write_to(file: int) -> None:
    """Let this process, which was forked, write its output to an open file."""
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115


class Forked:
    """A process of this step, with its output in a file."""

    def __init__(self, output: Path, body: Callable[..., int], *args: Any, **environment: str) -> None:
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(body, args, environment)

    def _run(self, body: Callable[..., int], args: tuple[Any, ...], environment: dict[str, str]) -> NoReturn:
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            write_to(file)
            os.environ.update(environment)
            status = body(*args)
        except BaseException:
            traceback.print_exc()
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def wait(self) -> tuple[int, str]:
        """The exit status and the output, which is copied to that of the step."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        text = self.output.read_text(errors="replace")
        sys.stdout.write(f"--- {self.output.name}: exit status {status}\n{text}\n")
        return status, text


def run(check: Check, name: str, *more: str, body: Callable[..., int] = train, **environment: str) -> tuple[int, str]:
    """One run of training alone. Returns its exit status and its output."""
    return Forked(check.own / f"{name}.txt", body, check.arguments(name, *more), **environment).wait()


def completed(check: Check, name: str, *more: str) -> dict[str, Any]:
    """The summary of a run that must complete."""
    status, _ = run(check, name, *more)
    expect(status == 0, f"run {name} ended with status {status}")
    return summary(check, name)


def summary(check: Check, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((check.run_dir(name) / "summary.json").read_text())
    expect(found["status"] == "completed", f"run {name} is {found['status']}")
    return found


def figures_of(summary: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a summary."""
    kept = ("precision", "prefix_precision", "images_per_second", "peak_memory_mb", "cached", "part_sizes")
    stages = {name: {key: stage.get(key) for key in kept} for name, stage in summary["stages"].items()}
    return {"top1": summary["best"]["top1"], "loss": summary["best"]["loss"], "stages": stages}


def ranks(check: Check, name: str, world: int, *more: str, body: Callable[..., int] = train) -> list[tuple[int, str]]:
    """Statuses and outputs of a run of several ranks on this machine, which share its GPU. Started as by srun."""
    common = {
        "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": str(world), "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    args = check.arguments(name, *more)
    started = [
        Forked(check.own / f"{name}-{rank}.txt", body, args, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **common)
        for rank in range(world)
    ]
    return [process.wait() for process in started]
