"""The run directory: what a run leaves behind, and whether there is one to go on with."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from omegaconf import DictConfig

from distil_tl.config import Config, interpolated, unsafe_changes
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.checkpoint import Checkpoints, Position, find_fault, load_state
from distil_tl.rundir.lock import Attempt
from distil_tl.utils.args import plain, read_yaml, to_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic, write_json, writing
from distil_tl.utils.log import logger
from distil_tl.utils.threads import available_cpus
from distil_tl.utils.version import __version__

SIGHT_S = 20.0  # that a file may need to be seen on other nodes
MAX_LISTED = 1000  # bad images named in summary.json; the checkpoint and the logs have all


@dataclass
class StageRecord:
    """What a stage did so far. `seconds` includes getting ready and evaluations, `train_seconds` does not."""

    epochs: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    epoch_seconds: float = 0.0  # of training in the epoch under way
    train_images: int = 0
    cached: bool = False
    precision: str | None = None  # that it trains in, from when it has begun
    prefix_precision: str | None = None  # that its frozen part computes in
    folded: bool | None = None  # whether BatchNorm of the whole network, where that trains, is folded
    trainable_parameters: int = 0
    train_top1: float | None = None  # over the last epoch, as it went
    top1: float | None = None  # on val, after the last epoch
    search: dict[str, Any] | None = None  # what `search_heads` found

    @property
    def has_begun(self) -> bool:
        return self.precision is not None

    def summary(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["epoch_seconds"]
        speed = self.train_images / self.train_seconds if self.train_seconds else 0.0
        return {**fields, "images_per_second": speed}


@dataclass
class RunState:
    """All that a run knows about itself besides tensors: where it is, and its history."""

    position: Position | None = None
    best: dict[str, Any] | None = None
    final: dict[str, Any] | None = None
    stages: dict[str, StageRecord] = field(default_factory=dict)
    seconds: float = 0.0
    bad_images: dict[str, dict[str, str]] = field(default_factory=dict)  # by split, path below it: reason

    @property
    def step(self) -> int:
        return self.position.step if self.position else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> RunState:
        return cls(
            position=Position(**tree["position"]),
            best=tree["best"],
            final=tree["final"],
            stages={name: StageRecord(**record) for name, record in tree["stages"].items()},
            seconds=tree["seconds"],
            bad_images=tree["bad_images"],
        )


@dataclass(frozen=True)
class Start:
    """How a run begins: `checkpoint` to go on from, or none; `completed` when there is nothing left to do."""

    run_dir: str
    checkpoint: str | None = None
    completed: bool = False


def find_start(config: Config, source: DictConfig) -> Start:
    """Decide whether to begin, go on, or leave a finished run alone. Looks, and writes nothing.

    Raises:
        UserError: for a change of configuration that the run in `run_dir` can't take, or a directory in use, or one
            that can't be written to.
    """
    assert config.run_dir is not None
    start = _find_start(config, source, Path(config.run_dir))
    if not start.completed:
        _refuse_unwritable(Path(config.run_dir))
    return start


def _refuse_unwritable(run_dir: Path) -> None:
    """Before work is done that could not be kept."""
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"run_dir={run_dir}: {place} is a file; choose another run_dir")
    for folder in (place, *(run_dir / name for name in ("checkpoints", "index", "logs"))):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"run_dir={run_dir}: {folder} can't be written to, for its permissions or as its disk is mounted "
                f"read-only; choose another run_dir"
            )


def _find_start(config: Config, source: DictConfig, run_dir: Path) -> Start:
    Attempt(run_dir).refuse_if_in_use()
    checkpoints = Checkpoints(run_dir / "checkpoints")
    here = checkpoints.newest_sound()
    if config.resume == "never":
        if here is not None or (run_dir / "metrics.jsonl").exists():
            raise UserError(
                f"resume=never, but {run_dir} already holds a run; choose another run_dir, delete it, or leave out "
                f"resume=never to go on with it"
            )
        return Start(str(run_dir))
    if here is not None:
        _refuse_changes(config, source, here, run_dir)
        if config.resume != "auto":
            logger.info("%s has checkpoints of its own, so resume=%s is left aside", run_dir, config.resume)
        records = RunState.from_json(load_state(here)["run"]).stages
        finished = all(
            stage.epochs == 0 or (name in records and records[name].epochs >= stage.epochs)
            for name, stage in config.stages.items()
        )
        # A damaged newest checkpoint, fallen back from, is trained again.
        done = finished and here == checkpoints.named("last") and _status(run_dir) == "completed"
        return Start(str(run_dir), str(here), done)
    if config.resume != "auto":
        there = _checkpoint_at(Path(config.resume))
        _refuse_changes(config, source, there, there.parent.parent)
        return Start(str(run_dir), str(there))
    return Start(str(run_dir))


def _checkpoint_at(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of the run directory there."""
    if (path / "state.json").exists():
        fault = find_fault(path)
        if fault is not None:
            raise UserError(f"resume={path} is damaged: {fault}")
        return path.resolve()
    found = Checkpoints(path / "checkpoints").newest_sound()
    if found is None:
        raise UserError(f"resume={path} holds no sound checkpoint")
    return found


def _refuse_changes(config: Config, source: DictConfig, checkpoint: Path, run_dir: Path) -> None:
    saved = run_dir / "config.yaml"
    if not saved.exists():
        logger.warning("there is no %s, so nobody can tell whether this is the configuration it was", saved)
        return
    state, before = load_state(checkpoint), read_yaml(saved, ())
    digests = state.get("interpolated", {}), interpolated(config, source)
    changes = unsafe_changes(before, plain(source), list(state["run"]["stages"]), digests)
    if changes:
        listing = "\n".join(f"  - {change}" for change in changes)
        raise UserError(
            f"{run_dir} holds a run of another configuration, and going on with this one would not be the same "
            f"training:\n{listing}\nGo back to its values, or choose another run_dir."
        )


def _status(run_dir: Path) -> str | None:
    try:
        status: str = json.loads((run_dir / "summary.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status


def refuse_unseen(info: DistInfo, path: Path, is_there: Callable[[], bool]) -> None:
    """Make sure that what rank 0 sees, or has just written, is there on every rank. A collective.

    Raises:
        UserError: on all ranks, naming the hosts that do not see it.
    """
    deadline = time.monotonic() + SIGHT_S
    while not (seen := is_there()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = {host for host in gather_objects(info, None if seen else socket.gethostname()) if host is not None}
    if blind:
        raise UserError(
            f"{path} is not seen on {', '.join(sorted(blind))} as rank 0 sees it: run_dir must lie on storage that all "
            f"nodes share, under one path (a relative one begins where each process was started)"
        )


class RunDirectory:
    """Rank 0's writer of the files that describe a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempt = Attempt(path)

    def begin(self, source: DictConfig, classes: Sequence[str], info: DistInfo, step: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.attempt.refuse_if_in_use()  # by one that began while this one looked at the images
        self.attempt.begin(step)
        write_atomic(self.path / "config.yaml", to_yaml(source))
        write_json(self.path / "env.json", environment(info))
        write_json(self.path / "classes.json", list(classes))
        (self.path / "summary.json").unlink(missing_ok=True)  # of an attempt before; a run in progress has none

    def write(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file, unless another attempt has taken over."""
        self.attempt.check()
        with writing(self.path / name):
            write_json(self.path / name, content)

    def write_summary(self, status: str, state: RunState, info: DistInfo, **more: Any) -> dict[str, Any]:
        summary = {
            "status": status,
            "world_size": info.world_size,
            "best": state.best,
            "final": state.final,
            **more,
            "stages": {name: record.summary() for name, record in state.stages.items()},
            "bad_images": {
                split: {"count": len(images), "images": dict(list(images.items())[:MAX_LISTED])}
                for split, images in state.bad_images.items()
            },
            "total_seconds": state.seconds,
            "peak_memory_mb": peak_memory_mb(info),
        }
        self.write("summary.json", summary)
        with writing(self.attempt.path):
            self.attempt.end()
        return summary


def peak_memory_mb(info: DistInfo) -> float:
    """Of this rank: of the GPU where there is one, else of the process. MiB."""
    if info.device.type == "cuda":
        return torch.cuda.max_memory_allocated(info.device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def environment(info: DistInfo) -> dict[str, Any]:
    """What ran where; nothing of the process's environment variables."""
    device = torch.cuda.get_device_name(info.device) if info.device.type == "cuda" else platform.processor()
    return {
        "versions": {
            "distil_tl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "git": git_state(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "launcher": info.launch.launcher,
        "world_size": info.world_size,
        "device": f"{info.device.type} {device}".strip(),
        "cpus": available_cpus(),
        "start_time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and state of the checkout this package runs from, or was copied from for a job; None if there is none."""
    package = Path(__file__).parents[1]
    snapshot = package / "snapshot.json"
    if snapshot.exists():
        known: dict[str, Any] | None = json.loads(snapshot.read_text())
        return known

    def ask(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
