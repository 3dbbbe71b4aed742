"""Training jobs on a real Slurm, for tests: submitted, slowed down, watched, and compared with undisturbed runs."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.arguments import WITHOUT_TIMM, small_args
from tests.helpers.paths import ROOT
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.same_run import differing, timeless
from tests.helpers.slurm_cluster import Partition
from tests.helpers.wandb_server import Server

# Each step of a job's first start takes longer, or each save, so that the test can disturb it in time. After a requeue
# it is fast.
# What it computes is the same. Python searches rarely for reference cycles, which saves a fifth of a job's CPU time.
SLOW_STEPS = """
import atexit, gc, os, sys, time
gc.set_threshold(100_000)
atexit.register(gc.freeze)
seconds = float(os.environ.get("SECONDS_A_STEP", 0)) if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 0
if seconds and any("submitit" in word or "launch.task" in word for word in sys.orig_argv):
    import torch.optim
    step = torch.optim.SGD.step
    def slow_step(self, *args, **kwargs):
        time.sleep(seconds)
        return step(self, *args, **kwargs)
    torch.optim.SGD.step = slow_step
    pause, save = float(os.environ.get("SECONDS_A_SAVE", 0)), torch.save
    def slow_save(*args, **kwargs):
        time.sleep(pause)
        return save(*args, **kwargs)
    torch.save = slow_save
"""


def wait_until(
    condition: Callable[[], object], message: Callable[[], object] = lambda: "", timeout: float = 300
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.1)


@dataclass
class Inputs:
    """What the tests of a session share. Made when first needed, by whichever thread needs it."""

    images: Path
    folder: Path  # for what is made here
    server: Server | None  # of W&B, reachable from the nodes
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def small(self) -> list[str]:
        """Arguments of a run of 18 steps in two stages, not followed by W&B."""
        return [*small_args(self.images), WITHOUT_TIMM]

    @property
    def job_args(self) -> list[str]:
        """Arguments of a run of 24 steps, with a checkpoint every 5 steps, followed by W&B."""
        tracking = ["tracking.wandb.mode=online", "tracking.wandb.finish_timeout_seconds=240"]  # for busy machines
        return [*self.small, "stages.full.epochs=3", "checkpoint.every_steps=5", *tracking]

    @property
    def untracked_args(self) -> list[str]:
        """The same, not followed by W&B, whose processes need CPU time."""
        return [arg for arg in self.job_args if not arg.startswith("tracking.wandb.")]

    def reference(self, ranks: int = 2, args: list[str] | None = None) -> Path:
        """The run directory of an undisturbed run on this machine: by default that of `job_args` on two ranks."""
        args = args or self.untracked_args
        with self._lock:
            run_dir = self.folder / f"{abs(hash(tuple(args)))}-{ranks}"
            if not run_dir.exists():
                given = [*args, f"run_dir={run_dir}", "tracking.wandb.mode=disabled"]
                assert run_ranks(ranks, train, given) == [0] * ranks
            return run_dir

    @property
    def slow_steps(self) -> Path:
        """A folder for PYTHONPATH with which jobs obey SECONDS_A_STEP."""
        with self._lock:
            folder = self.folder / "slow_steps"
            if not folder.exists():
                folder.mkdir()
                (folder / "sitecustomize.py").write_text(SLOW_STEPS)
            return folder


def launched(cluster: Partition, module: str, *args: object, status: int = 0) -> str:
    """The output of `python -m launch.MODULE`, run in a forked process that has torch imported already."""
    output = cluster.dir.parent / f"output-{threading.get_ident()}"
    context = multiprocessing.get_context("forkserver")
    arguments = (module, [str(arg) for arg in args], cluster.environment, output)
    process = context.Process(target=_launch, args=arguments)
    process.start()
    process.join(300)
    process.kill()  # unless it has ended
    assert process.exitcode == status, f"{process.exitcode}: {output.read_text()}"
    return output.read_text()


def _launch(module: str, args: list[str], environment: dict[str, str], output: Path) -> None:
    import importlib

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"launch/{module}.py", *args]
    sys.exit(importlib.import_module(f"launch.{module}").main(args))


def launched_by_command(cluster: Partition, module: str, *args: object) -> str:
    """The output of the command `python -m launch.MODULE`, as people start it."""
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *map(str, args)],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit_template(
    partition: Partition, name: str, options: list[str], args: list[str], cwd: Path, **environ: str
) -> str:
    """Submit a batch script of slurm/. The id of the job."""
    environment = {**partition.environment, **environ}
    environment["PYTHONPATH"] = f"{environ.get('PYTHONPATH', '')}:{ROOT}"
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["sbatch", "--parsable", "--cpus-per-task=1", "--time=10", *partition.options, *options]
    done = subprocess.run(
        [*command, str(ROOT / "slurm" / name), *args],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Run:
    """A submitted run, of one task by default.

    Args:
        seconds: that each step of its first start takes longer.
        save: the same for each save.
        slurm: keys of the configuration's section `slurm`.
    """

    def __init__(
        self, cluster: Partition, inputs: Inputs, run_dir: Path, args: list[str], seconds: float = 0,
        launch: Callable[..., str] = launched, save: float = 0, **slurm: object,
    ) -> None:  # fmt: skip
        self.cluster, self.inputs, self.run_dir = cluster, inputs, run_dir
        values = {"partition": cluster.name, "nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "time": 10}
        values |= {"signal_delay_s": 20, **slurm}
        variables = [f"export PYTHONPATH={inputs.slow_steps}", f"export SECONDS_A_STEP={seconds} SECONDS_A_SAVE={save}"]
        setup = f"slurm.setup=[{', '.join(variables)}]"
        options = [f"slurm.{key}={value}" for key, value in values.items()]
        launch(cluster, "submit", *args, f"run_dir={run_dir}", *options, setup)
        self.job = json.loads((run_dir / "submitted.json").read_text())["job_id"]

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: last_step(self.run_dir) >= step, self.output)

    def processes(self, rank: int = 0) -> list[int]:
        """The processes of a rank: that which trains, and those that it has forked."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words, environ = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
                ours = b"submitit.core._submit" in words and str(self.run_dir / "slurm").encode() in words
                if ours and f"SLURM_PROCID={rank}".encode() in environ:
                    found.append(int(path.name))
        return sorted(found)

    def output(self) -> str:
        return output_of(self.run_dir)

    def wait_until_same_as(self, reference: Path, timeout: float = 300) -> None:
        """Wait until the job has completed, and compare the run with an undisturbed one."""
        self.cluster.wait_for(self.job, "COMPLETED", timeout=timeout)
        same_run(self.run_dir, reference)
        if (self.run_dir / "wandb-id").exists():
            one_run_of_wandb(self.inputs, self.run_dir)


def output_of(run_dir: Path) -> str:
    """What the job of a run wrote."""
    return "".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*_log.out")))


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return max((line["step"] for line in lines(run_dir)), default=0)
    return 0


def same_run(run_dir: Path, reference: Path) -> None:
    """Bit-equal weights, optimizer state and metrics, and steps in increasing order."""
    assert timeless(lines(run_dir)) == timeless(lines(reference))
    steps = [line["step"] for line in lines(run_dir)]
    assert steps == sorted(steps)
    last, expected = (path / "checkpoints" / "last" for path in (run_dir, reference))
    assert last.readlink() == expected.readlink()
    weights = [load_file(path / "weights.safetensors") for path in (last, expected)]
    states = [torch.load(path / "train_state.pt", weights_only=True) for path in (last, expected)]
    assert differing("weights", *weights) + differing("state", *states) == []


def one_run_of_wandb(inputs: Inputs, run_dir: Path) -> None:
    """The server has each step once, in order, in a single run that is finished."""
    server = inputs.server
    assert server is not None
    steps = [line["step"] for line in lines(run_dir, window="interval")]
    # The job may end, and summary.json is written, before W&B has sent the end of the run.
    wait_until(lambda: server.run(run_dir)["state"] == "finished", lambda: output_of(run_dir))
    assert server.steps(run_dir) == steps == list(range(1, len(steps) + 1))


def all_ended(cluster: Partition, folder: Path, timeout: float = 300) -> dict[str, Any]:
    """The status of a sweep, when all of its runs are completed or failed."""
    deadline = time.monotonic() + timeout
    while True:
        found: dict[str, Any] = json.loads(launched(cluster, "status", folder, "--json"))
        if {run["state"] for run in found["runs"]} <= {"completed", "failed"}:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(2)
