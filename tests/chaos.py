"""A small staged job, interrupted at chosen lines of the code in the ways a cluster knows, and gone on with.

The moment of a fault is a line: the n-th one that a rank executes within a region of the job (its start-up, its steps,
an evaluation, the writing of a checkpoint, its end), counted with `sys.settrace`. The uninterrupted reference run
counts how many there are, so that a random number hits all of them alike.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file

from distil_tl.checkpoint import find_fault
from tests import ranks
from tests.ranks import free_port, lines

PACKAGE = str(Path(importlib.import_module("distil_tl").__file__ or "").parent)
REGIONS = {
    "start-up": ("find_start", "open_splits", "prepare_weights", "build", "open_job", "get_ready", "begin_stage"),
    "step": ("train_one_epoch",),
    "evaluation": ("evaluate",),
    "finish": ("finish",),
}  # and "checkpoint", which is Checkpoints._write
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr2": signal.SIGUSR2, "twice": signal.SIGTERM}
DAMAGE = ("truncated", "flipped", "half gone")
KINDS = ("kill one", "kill all", *SIGNALS, "disk full", *DAMAGE)
PATIENCE = 90  # seconds that one attempt may take


@dataclass(frozen=True)
class Fault:
    """What happens when rank `by` comes to its `line`-th line within `region`. `chance` in 0..1 settles the rest."""

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
) -> None:
    """`python -m distil_tl.train` in a fresh process, which keeps in `scratch` what it saw and what struck it."""
    os.setpgid(0, 0)  # its loader workers can be found by it
    torch.set_num_threads(1)
    os.environ["DISTIL_TL_CACHE"] = str(run_dir_of(args).parent / "cache")
    multiprocessing.set_start_method("fork", force=True)  # of its loader workers, as in a process of its own
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
    arm(counted, fault if fault is not None and fault.by == rank else None, scratch, run_dir, world)
    note_samples(scratch / f"seen-{rank}.jsonl")
    if prepare is not None:
        prepare()
    status = ranks.train(args)
    sys.settrace(None)
    (scratch / f"counted-{rank}.json").write_text(json.dumps(counted))
    sys.exit(status)


def run_dir_of(args: list[str]) -> Path:
    return Path([arg for arg in args if arg.startswith("run_dir=")][-1].removeprefix("run_dir="))


def arm(counted: Counter[str], fault: Fault | None, scratch: Path, run_dir: Path, world: int) -> None:
    """Count the lines of all regions from now on, and let `fault` strike at its own."""

    def local(region: str, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            counted[region] += 1
            if fault is not None and region == fault.region and counted[region] == fault.line:
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                (scratch / "struck").write_text(where)
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
            before = sys.gettrace()
            sys.settrace(functools.partial(enter, region))
            try:
                return function(*args, **kwargs)
            finally:
                sys.settrace(before)

        return wrapper

    module: Any = importlib.import_module("distil_tl.train")
    for region, names in REGIONS.items():
        for name in names:
            setattr(module, name, traced(region, getattr(module, name)))
    writer: Any = importlib.import_module("distil_tl.checkpoint").Checkpoints
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
    """Leave little room on the disk, from none to what nearly does for a checkpoint."""
    checkpoint = 3 << 20
    room = int(chance * 1.2 * checkpoint)
    if not os.path.ismount(run_dir.parent):  # no disk of our own to fill: files may just not get large
        resource.setrlimit(resource.RLIMIT_FSIZE, (room // 2, resource.RLIM_INFINITY))
        return
    disk = os.statvfs(run_dir)
    with (run_dir.parent / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - room))


def note_samples(path: Path) -> None:
    """Write down (stage, step of the stage, [(image, hash of its tensor)]) of each training batch of this rank."""
    module: Any = importlib.import_module("distil_tl.train")
    original = module.train_epoch

    def train_epoch(info: Any, run: Any, batches: Any, sampler: Any, *args: Any, **kwargs: Any) -> Any:
        first = sampler.epoch * sampler.steps_per_epoch + sampler.consumed // sampler.global_batch_size

        def noted() -> Iterator[Any]:
            for step, batch in enumerate(batches, start=first):
                hashes = [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() for image in batch.images]
                with path.open("a") as file:
                    file.write(json.dumps([run.name, step, list(zip(batch.indices.tolist(), hashes))]) + "\n")  # noqa: B905
                yield batch

        return original(info, run, noted(), sampler, *args, **kwargs)

    module.train_epoch = train_epoch


# Around them.


@dataclass
class Ended:
    statuses: list[int | None]  # None: had to be killed for not ending
    said: list[str]
    struck: str | None  # file and line, if the fault came to strike
    seconds: float


def attempt(
    scratch: Path,
    args: list[str],
    world: int,
    fault: Fault | None = None,
    *,
    patience: float = PATIENCE,
    prepare: Callable[[], None] | None = None,
) -> Ended:
    """Start the job on `world` ranks, each of which calls `prepare` before it, and wait for its end."""
    scratch.mkdir(parents=True)
    port, context = free_port(), ranks._context
    began = time.monotonic()
    processes = [
        context.Process(target=run_rank, args=(scratch, args, rank, world, port, fault, prepare), daemon=False)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    alive = processes
    while alive and time.monotonic() < began + patience:
        alive = [process for process in processes if process.exitcode is None]
        if fault is not None and fault.kind == "freeze" and alive == [processes[fault.by]]:
            break
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
    """Processes, loader workers too, of the attempts below `scratch` that live on for longer than `wait` seconds."""
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
    """Damage the newest checkpoint; what was done."""
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
    """A file system of its own at `folder`, where this user may mount one."""
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


# A run from its beginning through its faults to its end.


@dataclass(frozen=True)
class Plan:
    """The worlds of the attempts, and the faults that end all but the last of them."""

    name: str
    args: tuple[str, ...]
    variant: str
    worlds: tuple[int, ...]
    faults: tuple[Fault, ...]
    seed: int

    @property
    def same_world(self) -> bool:
        return set(self.worlds) == {2}


@dataclass
class Reference:
    run_dir: Path
    seen: dict[tuple[str, int], dict[int, str]]
    counted: list[dict[str, int]]  # lines by region, by rank


@dataclass
class Outcome:
    plan: Plan
    run_dir: Path
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def make_reference(folder: Path, args: list[str]) -> Reference:
    run_dir = folder / "run"
    ended = attempt(folder / "scratch", [*args, f"run_dir={run_dir}"], 2)
    assert ended.statuses == [0, 0], ended
    counted = [json.loads((folder / "scratch" / f"counted-{rank}.json").read_text()) for rank in (0, 1)]
    seen, wrong = samples(folder / "scratch")
    assert not wrong, wrong
    return Reference(run_dir, seen, counted)


def carry_out(plan: Plan, folder: Path, reference: Reference) -> Outcome:
    """Go through the plan; the outcome lists all that is not as it must be."""
    began = time.monotonic()
    disk = folder / "disk"
    with small_disk(disk) if any(fault.kind == "disk full" for fault in plan.faults) else contextlib.nullcontext():
        disk.mkdir(parents=True, exist_ok=True)
        outcome = Outcome(plan, disk / "run")
        args = [*plan.args, f"run_dir={outcome.run_dir}"]
        rng = random.Random(plan.seed)
        for number, world in enumerate(plan.worlds):
            fault = plan.faults[number] if number < len(plan.faults) else None
            ended = attempt(folder / f"attempt-{number}", args, world, fault)
            (disk / "ballast").unlink(missing_ok=True)
            note = f"{world} ranks: {fault.kind + ' in ' + fault.region if fault else 'no fault'}"
            note += f" at {ended.struck} of rank {fault.by}" if fault and ended.struck else ""
            if fault and fault.kind in DAMAGE and ended.struck:
                note += f", {damage(outcome.run_dir, fault.kind, rng)}"
            outcome.notes.append(f"{note} -> {ended.statuses}")
            wrong = wrong_end(ended, fault)
            if wrong:
                outcome.problems.append(f"attempt {number} ({outcome.notes[-1]}): {wrong}\n" + "\n".join(ended.said))
            if ended.statuses == [0] * world:
                break
        outcome.problems += [f"process {pid} lives on" for pid in left_over_processes(folder)]
        outcome.problems += compare(outcome.run_dir, reference, folder, exact=plan.same_world)
    outcome.seconds = time.monotonic() - began
    return outcome


def wrong_end(ended: Ended, fault: Fault | None) -> str | None:
    """What is wrong with how an attempt ended, after what befell it."""
    if None in ended.statuses:
        return "it did not end"
    if set(ended.statuses) == {-signal.SIGKILL}:  # what orphaned loader workers say is torch's own
        return None
    for said in ended.said:
        if "Traceback" in said or "Logging error" in said:
            return "a traceback"
    statuses = {status for status in ended.statuses if status is not None}
    if fault is None or ended.struck is None:
        return None if statuses == {0} else f"statuses {ended.statuses} without a fault"
    if fault.kind in SIGNALS:  # too late to stop is fine, and so is dying of the second one when all is saved
        allowed = [{0}, {3}]
        if fault.kind == "twice":
            allowed += [{0, -SIGNALS["twice"]}, {3, -SIGNALS["twice"]}]
    elif fault.kind == "disk full":
        allowed = [{0}, {1}]
    elif fault.kind == "kill one":
        allowed = [{-9}, {-9, 1}, {-9, 0}]
    else:
        return None
    if statuses not in allowed:
        return f"statuses {ended.statuses}"
    if statuses == {1} and "can't write" not in ended.said[0]:
        return "no word of what could not be written"
    return None


def samples(folder: Path) -> tuple[dict[tuple[str, int], dict[int, str]], list[str]]:
    """Image and hash by (stage, step), over all ranks and attempts below `folder`; and what was not the same twice."""
    seen: dict[tuple[str, int], dict[int, str]] = {}
    wrong = []
    for path in sorted(folder.rglob("seen-*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line of a rank that was killed
                stage, step, pairs = json.loads(line)
                images = seen.setdefault((stage, step), {})
                wrong += [f"image {i} of {stage} {step} differs" for i, h in pairs if images.setdefault(i, h) != h]
    return seen, wrong


def compare(run_dir: Path, reference: Reference, folder: Path, *, exact: bool) -> list[str]:
    """How a run that went through faults differs from the one that did not; nothing, hopefully."""
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run_dir, reference.run_dir)]
    if summaries[0]["status"] != "completed":
        return [f"the run is {summaries[0]['status']}"]
    found = []
    checkpoints = run_dir / "checkpoints"
    steps = sorted(path for path in checkpoints.iterdir() if path.is_dir() and not path.is_symlink())
    names = {path.name for path in checkpoints.iterdir()} - {path.name for path in steps} - {"last", "best"}
    found += [f"checkpoints/{name} is left over" for name in sorted(names)]
    if len(steps) > 3 or any(not path.name.removeprefix("step-").isdigit() for path in steps):
        found.append(f"checkpoints left: {[path.name for path in steps]}")
    found += [f"{path.name}: {fault}" for path in steps if (fault := find_fault(path))]
    missing = [name for name in ("report.html", "evaluation.json", "metrics.jsonl") if not (run_dir / name).exists()]
    found += [f"no {name}" for name in missing]

    seen, wrong = samples(folder)
    found += wrong
    if seen != reference.seen:
        steps_off = [key for key in seen.keys() | reference.seen.keys() if seen.get(key) != reference.seen.get(key)]
        found.append(f"other samples in {sorted(steps_off)}")

    metrics = [timeless(lines(path)) for path in (run_dir, reference.run_dir)]
    if exact:
        if metrics[0] != metrics[1]:
            first = next((i for i, pair in enumerate(zip(*metrics, strict=False)) if pair[0] != pair[1]), "the end")
            found.append(f"{len(metrics[0])} lines of metrics, not {len(metrics[1])}; they differ from {first} on")
        for key in ("best", "final"):
            if summaries[0][key] != summaries[1][key]:
                found.append(f"{key}: {summaries[0][key]}, not {summaries[1][key]}")
        for name in ("last", "best"):
            mine, theirs = (path / "checkpoints" / name for path in (run_dir, reference.run_dir))
            if mine.readlink() != theirs.readlink():
                found.append(f"{name} is {mine.readlink()}, not {theirs.readlink()}")
            found += differing(f"{name} weights", *(load_file(p / "weights.safetensors") for p in (mine, theirs)))
            states = (torch.load(path / "train_state.pt", weights_only=True) for path in (mine, theirs))
            found += differing(f"{name} state", *states)
    else:
        keys = [[(m["step"], m["split"], m["window"], m["lr"]) for m in part] for part in metrics]
        if keys[0] != keys[1]:
            found.append("other lines of metrics")
        for one, two in zip(*metrics, strict=False):
            if abs(one["loss"] - two["loss"]) > 1e-3 * max(1.0, abs(two["loss"])):
                found.append(f"loss {one['loss']} and not {two['loss']} at step {one['step']} ({one['split']})")
    images = [{name: stage["train_images"] for name, stage in one["stages"].items()} for one in summaries]
    if images[0] != images[1]:
        found.append(f"trained on {images[0]} images, not {images[1]}")
    return [*found[:20], f"and {len(found) - 20} more"] if len(found) > 20 else found


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rates = ("time", "seconds", "images_per_second")
    return [{key: value for key, value in line.items() if key not in rates} for line in found]


def differing(name: str, one: Any, two: Any) -> list[str]:
    """Where two nested containers are not bit-equal, times left out."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return [f"{name}: other keys"]
        return [d for key in one if key != "seconds" for d in differing(f"{name}/{key}", one[key], two[key])]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [f"{name}: other length"]
        return [d for i in range(len(one)) for d in differing(f"{name}/{i}", one[i], two[i])]
    if isinstance(one, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        same = same and bool((one.reshape(-1).view(torch.uint8) == two.reshape(-1).view(torch.uint8)).all())
        return [] if same else [f"{name} differs"]
    return [] if one == two else [f"{name}: {one!r}, not {two!r}"]


def random_fault(rng: random.Random, kind: str, world: int, reference: Reference, *, first: bool) -> Fault:
    region = rng.choice(("start-up", "step", "step", "evaluation", "checkpoint", "checkpoint", "finish"))
    if kind == "disk full" and region in ("finish", "start-up"):
        region = "step"
    by = 0 if region == "checkpoint" else rng.randrange(world)
    if kind == "disk full" and os.geteuid() != 0:
        by = 0  # whose files must not get large
    there = reference.counted[min(by, 1)][region]
    # A first attempt gets to every line; of what a later one has left to do, a random part.
    line = 1 + int(rng.random() * there * (1 if first or region in ("start-up", "finish") else 0.5))
    return Fault(kind, region, by, line, rng.random())


def random_plan(number: int, args: list[str], variant: str, kind: str, reference: Reference, final: int) -> Plan:
    """A plan whose first fault is of `kind`, and that ends on `final` ranks, with up to two more faults between."""
    rng = random.Random(f"chaos {number}")
    faults = [random_fault(rng, kind, 2, reference, first=True)]
    worlds = [2]
    for _ in range(rng.choice((0, 1, 1, 2))):
        world = 2 if final == 2 else rng.choice((1, 2, 4))
        worlds.append(world)
        faults.append(random_fault(rng, rng.choice(KINDS), world, reference, first=False))
    return Plan(f"{number:02d}", (*args, f"data.workers={int(number % 5 == 4)}"), variant, (*worlds, final),
                tuple(faults), number)  # fmt: skip


def table(outcomes: list[Outcome]) -> str:
    """A line for each run, with its attempts below it, and counts by kind."""
    rows = []
    for outcome in outcomes:
        plan = outcome.plan
        result = "FAILED" if outcome.problems else "bit-equal" if plan.same_world else "same samples"
        worlds = "-".join(map(str, plan.worlds))
        rows.append(f"{plan.name}  {plan.variant:<10} worlds {worlds:<9} {outcome.seconds:5.1f} s  {result}")
        rows += [f"      {note}" for note in outcome.notes]
    notes = [note for outcome in outcomes for note in outcome.notes]
    struck = Counter(note.split(": ", 1)[1].split(" in ")[0] for note in notes if " at " in note)
    regions = Counter(note.split(" in ", 1)[1].split(" at ")[0] for note in notes if " at " in note)
    rows.append(f"{len(outcomes)} runs, {len(notes)} attempts, {sum(struck.values())} faults that struck")
    rows.append("by kind: " + ", ".join(f"{kind} {count}" for kind, count in sorted(struck.items())))
    rows.append("by moment: " + ", ".join(f"{region} {count}" for region, count in sorted(regions.items())))
    return "\n".join(rows)
