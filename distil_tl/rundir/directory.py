"""The files that describe a run, written by rank 0."""

from __future__ import annotations

import datetime
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from omegaconf import DictConfig

from distil_tl.data.pixels import installed_decoders
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.lock import Attempt
from distil_tl.rundir.state import RunState
from distil_tl.utils.args import to_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import read_json, write_atomic, write_json, writing
from distil_tl.utils.processes import run_text
from distil_tl.utils.threads import available_cpus
from distil_tl.utils.version import __version__

VISIBLE_WITHIN_S = 20.0  # a network file system may show a new file on other nodes this late
MAX_LISTED = 1000  # bad images listed in summary.json; the checkpoint and the logs list all


class RunDirectory:
    """Rank 0's writer of the files of a run directory, other than checkpoints and metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempt = Attempt(path)

    def open(self, unresolved: DictConfig, classes: Sequence[str], info: DistInfo, step: int) -> None:
        """Claim the directory for this process and write config.yaml, env.json and classes.json.

        Args:
            unresolved: the configuration with its interpolations unresolved.
            step: that the run resumes from.

        Raises:
            UserError: another process is using the directory.
            NoProgressError: the job was restarted too often at this step.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.attempt.refuse_if_in_use()  # again: a process may have started while this one scanned the images
        self.attempt.begin(step)
        write_atomic(self.path / "config.yaml", to_yaml(unresolved))
        write_json(self.path / "env.json", environment(info))
        write_json(self.path / "classes.json", list(classes))
        (self.path / "summary.json").unlink(missing_ok=True)  # of an earlier attempt; a run in progress has none

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file.

        Raises:
            SupersededError: a newer attempt uses the directory.
            WriteError: the file can't be written.
        """
        self.attempt.check()
        with writing(self.path / name):
            write_json(self.path / name, content)

    def write_summary(self, status: str, state: RunState, info: DistInfo, **more: Any) -> dict[str, Any]:
        """Write summary.json and end the attempt. Returns the summary. Raises as `write` does."""
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
            "resolved": state.resolved,
            "total_seconds": state.seconds,
            "peak_memory_mb": max([peak_memory_mb(info), *(stage.peak_memory_mb for stage in state.stages.values())]),
        }
        self.write("summary.json", summary)
        with writing(self.attempt.path):
            self.attempt.end()
        return summary


def check_shared(info: DistInfo, path: Path, is_visible: Callable[[], bool], what: str = "run_dir") -> None:
    """Check that every rank sees a file that rank 0 sees or has just written. A collective.

    Args:
        what: it is of, for the message.

    Raises:
        UserError: on all ranks, naming the hosts that do not see it.
    """
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not (visible := is_visible()) and time.monotonic() < deadline:
        time.sleep(0.1)
    hosts = {host for host in gather_objects(info, None if visible else socket.gethostname()) if host is not None}
    if hosts:
        raise UserError(
            f"{path} is not visible on {', '.join(sorted(hosts))}, but it is on rank 0: {what} must be on storage "
            f"that all nodes share, under the same path (a relative path starts where each process starts)"
        )


def peak_memory_mb(info: DistInfo) -> float:
    """Peak memory of this rank in MiB: of its GPU if it has one, else of the process."""
    if info.device.type == "cuda":
        return torch.cuda.max_memory_allocated(info.device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak_memory(info: DistInfo) -> None:
    """Measure the peak from now on; only possible on a GPU."""
    if info.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(info.device)


def environment(info: DistInfo) -> dict[str, Any]:
    """Versions, code, command and machine. No environment variables: they may hold secrets."""
    device = torch.cuda.get_device_name(info.device) if info.device.type == "cuda" else platform.processor()
    return {
        "versions": {
            "distil_tl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
        "decoders": installed_decoders(),
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
    """Commit of the code and whether it was changed since; None outside a checkout.

    A job runs a copy of the code. `launch/snapshot.py` puts the state of the original beside it.
    """
    package = Path(__file__).parents[1]
    snapshot = package / "snapshot.json"
    if snapshot.exists():
        recorded: dict[str, Any] | None = read_json(snapshot)
        return recorded

    def git(*args: str) -> str:
        command = ["git", "-C", str(package), *args]
        return run_text(command, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
