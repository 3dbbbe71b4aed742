"""Faults: a small staged job, interrupted at a chosen line of the code as happens on a cluster.

The moment of a fault is the n-th line that a rank executes within a region of the job (its start-up, its steps,
an evaluation, the writing of a checkpoint, its end), counted with `sys.settrace`. The uninterrupted reference run
counts how many there are, so that a random number is equally likely to hit each of them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tests.helpers import ranks
from tests.helpers.ranks import free_port
from tests.helpers.same_run import hashed

PACKAGE = str(Path(importlib.import_module("distil_tl").__file__ or "").parent)
REGIONS = {
    "start-up": (
        "look_for_start",
        "open_splits",
        "download_weights",
        "build",
        "open_run",
        "set_up_stage",
        "begin_stage",
    ),
    "step": ("train_one_epoch",),
    "evaluation": ("evaluate",),
    "finish": ("finish",),
}  # and "checkpoint", which is Checkpoints._write
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr2": signal.SIGUSR2, "twice": signal.SIGTERM}
DAMAGE = ("truncated", "flipped", "half gone")
KINDS = ("kill one", "kill all", *SIGNALS, "disk full", *DAMAGE)
PATIENCE = 200  # seconds that one attempt may take


@dataclass(frozen=True)
class Fault:
    """What happens when rank `by` reaches its `line`-th line within `region`. `chance` in 0..1 decides the details."""

    kind: str
    region: str
    by: int
    line: int
    chance: float = 0.5


# In the ranks.


def run_rank(
    scratch: Path,
    args: list[str],
    rank: int,
    world: int,
    port: int,
    fault: Fault | None,
    prepare: Callable[[], None] | None,
    count: bool,
) -> None:
    """`python -m distil_tl.train` in a new process, which records in `scratch` its samples and the fault."""
    os.setpgid(0, 0)  # its loader workers can be found by it
    torch.set_num_threads(1)
    os.environ["DISTIL_TL_CACHE"] = str(run_dir_of(args).parent / "cache")
    multiprocessing.set_start_method("fork", force=True)  # of its loader workers, as in a separate process
    out = os.open(scratch / f"out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    (scratch / f"pid-{rank}").write_text(str(os.getpid()))
    if world > 1:
        numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ |= {key: str(value) for key, value in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_dir = run_dir_of(args)
    counted: Counter[str] = Counter()
    own = fault if fault is not None and fault.by == rank else None
    if count or own is not None:
        arm(counted, own, scratch, run_dir, world)
    note_samples(scratch / f"seen-{rank}.jsonl")
    if prepare is not None:
        prepare()
    status = ranks.train(args)
    sys.settrace(None)
    (scratch / f"counted-{rank}.json").write_text(json.dumps(counted))
    atexit._run_exitfuncs()  # which a process of multiprocessing does not do by itself
    sys.exit(status)


def run_dir_of(args: list[str]) -> Path:
    return Path([arg for arg in args if arg.startswith("run_dir=")][-1].removeprefix("run_dir="))


def arm(counted: Counter[str], fault: Fault | None, scratch: Path, run_dir: Path, world: int) -> None:
    """Count the executed lines of all regions; or of the region of `fault` alone, until its line, and trigger it.

    To trace lines takes most of the time of a small run.
    """

    def local(region: str, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            counted[region] += 1
            if fault is not None and region == fault.region and counted[region] == fault.line:
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                (scratch / "struck").write_text(where)
                sys.settrace(None)
                strike(fault, scratch, run_dir, world)
        return functools.partial(local, region)

    def enter(region: str, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and "/data/" not in name:
            return local(region, frame, event, argument)
        return None

    def traced(region: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if fault is not None and counted[region] >= fault.line:
                return function(*args, **kwargs)
            before = sys.gettrace()
            sys.settrace(functools.partial(enter, region))
            try:
                return function(*args, **kwargs)
            finally:
                sys.settrace(before)

        return wrapper

    module: Any = importlib.import_module("distil_tl.train")
    regions = REGIONS if fault is None else {name: REGIONS[name] for name in REGIONS if name == fault.region}
    for region, names in regions.items():
        for name in names:
            setattr(module, name, traced(region, getattr(module, name)))
    if fault is not None and fault.region != "checkpoint":
        return
    writer: Any = importlib.import_module("distil_tl.rundir.checkpoint").Checkpoints
    writer._write = traced("checkpoint", writer._write)


def strike(fault: Fault, scratch: Path, run_dir: Path, world: int) -> None:
    me = os.getpid()
    if fault.kind in SIGNALS:
        os.kill(me, SIGNALS[fault.kind])
        if fault.kind == "twice":
            again = threading.Timer(0.3 * fault.chance, os.kill, (me, SIGNALS[fault.kind]))
            again.daemon = True
            again.start()
    elif fault.kind == "freeze":
        os.kill(me, signal.SIGSTOP)
    elif fault.kind == "signal to everyone":  # loader workers too, as Slurm does
        for rank in range(world):
            for number in (signal.SIGTERM, signal.SIGUSR2):
                os.killpg(int((scratch / f"pid-{rank}").read_text()), number)
    elif fault.kind == "disk full":
        fill(run_dir, fault.chance)
    else:
        others = range(world) if fault.kind != "kill one" else ()
        pids = [int(path.read_text() or 0) for rank in others if (path := scratch / f"pid-{rank}").exists()]
        for pid in [pid for pid in pids if pid not in (0, me)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.kill(me, signal.SIGKILL)


def fill(run_dir: Path, chance: float) -> None:
    """Leave little space on the disk, from none to almost enough for a checkpoint."""
    checkpoint = 3 << 20
    space = int(chance * 1.2 * checkpoint)
    if not os.path.ismount(run_dir.parent):  # no separate file system to fill: limit the size of files instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (space // 2, resource.RLIM_INFINITY))
        return
    disk = os.statvfs(run_dir)
    with (run_dir.parent / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - space))


def note_samples(path: Path) -> None:
    """Record (stage, step of the stage, its images, `hashed`) of each training batch of this rank."""
    module: Any = importlib.import_module("distil_tl.train")
    original = module.forward_backward

    def forward_backward(info: Any, training: Any, batch: Any, step: int, micro: int) -> Any:
        with path.open("a") as file:
            file.write(json.dumps([training.stage.name, step, hashed(batch)]) + "\n")
        return original(info, training, batch, step, micro)

    module.forward_backward = forward_backward


# In the test process.


@dataclass
class Ended:
    statuses: list[int | None]  # None: had to be killed for not ending
    said: list[str]
    struck: str | None  # file and line of the fault, if it happened
    seconds: float


def attempt(
    scratch: Path,
    args: list[str],
    world: int,
    fault: Fault | None = None,
    *,
    patience: float = PATIENCE,
    prepare: Callable[[], None] | None = None,
    frozen: int | None = None,
    count: bool = False,
) -> Ended:
    """Run the job on `world` ranks, each of which calls `prepare` first, and wait for its end.

    Rank `frozen` is not waited for: it never ends. With `count` the executed lines of each region are counted.
    """
    scratch.mkdir(parents=True)
    port, context = free_port(), ranks.forkserver()
    began = time.monotonic()
    processes = [
        context.Process(target=run_rank, args=(scratch, args, rank, world, port, fault, prepare, count), daemon=False)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    if fault is not None and fault.kind == "freeze":
        frozen = fault.by
    awaited = [process for rank, process in enumerate(processes) if rank != frozen]
    while any(process.exitcode is None for process in awaited) and time.monotonic() < began + patience:
        time.sleep(0.02)
    seconds = time.monotonic() - began
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    struck = scratch / "struck"
    return Ended(
        statuses,
        [path.read_text() if (path := scratch / f"out-{rank}").exists() else "" for rank in range(world)],
        struck.read_text() if struck.exists() else None,
        seconds,
    )


def left_over_processes(scratch: Path, wait: float = 20) -> list[int]:
    """Ids of processes of the attempts below `scratch`, loader workers included, still alive after `wait` seconds."""
    groups = {int(path.read_text() or 0) for path in scratch.rglob("pid-*")}
    deadline = time.monotonic() + wait
    while True:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) in groups and state != "Z":
                    found.append(int(stat.parent.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def damage(run_dir: Path, kind: str, rng: random.Random) -> str:
    """Damage the newest checkpoint; returns a description."""
    found = sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir())
    if not found:
        return "no checkpoint yet"
    files = sorted(found[-1].iterdir())
    if kind == "half gone":
        for path in rng.sample(files, len(files) // 2):
            path.unlink()
        return f"{found[-1].name}: half of its files deleted"
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    if kind == "truncated" or not data:
        data = data[: rng.randrange(max(1, len(data)))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{found[-1].name}/{path.name} {kind}"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A separate file system at `folder`, if this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
