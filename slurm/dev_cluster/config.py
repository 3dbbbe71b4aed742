"""The cluster's settings, paths and addresses, and the errors of this command."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

DEFAULT_DIR = "/tmp/distil-tl-dev-cluster"
DIR_VARIABLE = "DISTIL_TL_DEV_CLUSTER"
HEAD = "head"
GPUS = 4  # per node; they are only claimed
FILE = "cluster.json"


class RefusedError(Exception):
    """The request cannot be carried out. Nothing was changed."""


class FailedError(Exception):
    """The request was started and failed. The message ends with the last lines of `logs`."""

    def __init__(self, message: str, *logs: Path) -> None:
        super().__init__("\n".join([message, *(tail(log) for log in logs)]))


@dataclass(frozen=True)
class Cluster:
    """A cluster. `memory` is in MB, `cpus` and `memory` are per node, `subnet` is a /24."""

    dir: Path
    name: str
    nodes: int
    cpus: int
    memory: int
    subnet: str

    @property
    def node_names(self) -> list[str]:
        return [f"n{i + 1}" for i in range(self.nodes)]

    def address(self, machine: str) -> str:
        """The IPv4 address of the head or a node; of the host for an empty name."""
        number = {"": 1, HEAD: 2}.get(machine) or 10 + int(machine[1:])
        return str(ipaddress.IPv4Network(self.subnet)[number])

    @property
    def slurm_conf(self) -> Path:
        return self.dir / "etc/slurm.conf"

    def log(self, name: str) -> Path:
        return self.dir / "log" / f"{name}.log"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which Slurm's commands and this script find the cluster."""
        return {"SLURM_CONF": str(self.slurm_conf), DIR_VARIABLE: str(self.dir)}

    def write(self) -> None:
        (self.dir / FILE).write_text(json.dumps(asdict(self), default=str))


def read_cluster(directory: Path) -> Cluster:
    """The cluster in a directory. Raises RefusedError if there is none."""
    try:
        values = json.loads((directory / FILE).read_text())
        return Cluster(**values | {"dir": directory})
    except (OSError, ValueError, TypeError):
        raise RefusedError(f"there is no cluster in {directory}") from None


def digest(directory: Path) -> str:
    """Eight hexadecimal digits that identify the directory."""
    return hashlib.sha256(str(directory).encode()).hexdigest()[:8]


def tail(log: Path, lines: int = 15) -> str:
    try:
        last = log.read_text(errors="replace").splitlines()[-lines:]
    except OSError as error:
        last = [str(error.strerror)]
    return "\n".join([f"--- {log}", *last])


def message(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
