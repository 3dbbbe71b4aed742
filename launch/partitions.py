"""The partitions that a job may use, and the nodes there, as sinfo shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from launch.slurm_config import SlurmConfig
from launch.squeue import SlurmUnavailableError, list_nodes

_DOWN = ("down", "drain", "fail", "maint", "reboot", "unk")  # beginnings of states


@dataclass
class Partition:
    """A partition.

    Attributes:
        limit: its longest time, such as 1-00:00:00 or infinite.
        nodes: how many nodes there are of each kind (GPUs as in `gpu:a100:4`, CPUs), in whatever state.
        has_down: whether some nodes are not available now.
    """

    name: str
    limit: str
    nodes: list[tuple[str, int, int]] = field(default_factory=list)
    has_down: bool = False


def read_partitions(names: str | None) -> list[Partition]:
    """The partitions of these names (separated by commas), or the default one. Empty if Slurm does not tell."""
    wanted = names.split(",") if names is not None else None
    try:
        lines = list_nodes("%P|%l|%G|%c|%D|%T").splitlines()
    except SlurmUnavailableError:
        return []
    found: dict[str, Partition] = {}
    for line in lines:
        name, limit, gres, cpus, count, state = (line.strip().split("|") + [""] * 6)[:6]
        if name.rstrip("*") not in wanted if wanted is not None else not name.endswith("*"):
            continue
        partition = found.setdefault(name, Partition(name.rstrip("*"), limit))
        if cpus.isdigit() and count.isdigit():
            partition.nodes.append((gres, int(cpus), int(count)))
        partition.has_down = partition.has_down or state.lower().startswith(_DOWN) or state.endswith("*")
    return list(found.values())


def nodes_for(slurm: SlurmConfig, partition: Partition) -> int:
    """How many nodes have the GPUs and CPUs that a job wants of each node."""
    kind = str(slurm.gpus_per_node).rpartition(":")[0]
    return sum(
        count
        for gres, cpus, count in partition.nodes
        if cpus >= slurm.tasks * slurm.cpus_per_task and _gpus(gres, kind) >= slurm.gpus
    )


def _gpus(gres: str, kind: str) -> int:
    """GPUs of a node, of a type or of any."""
    found = re.findall(r"\bgpu:(?:([^:,()]+):)?(\d+)", gres)
    return sum(int(number) for own, number in found if kind in ("", own))
