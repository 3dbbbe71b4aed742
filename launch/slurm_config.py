"""What a job asks of Slurm: the `slurm` section of a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EARLY_S = 60  # a warning may come up to this much before its time

# Options of sbatch that have a key of their own here, by which they are checked.
KEY_OF = {
    **{name: name for name in ("partition", "account", "qos", "nodes", "mem", "time", "constraint", "exclude")},
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task"), "gpus_per_node"),  # a task must see its node's GPUs
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "array": "array_parallelism",
    "signal": "signal_delay_s",
}


@dataclass
class SlurmConfig:
    partition: str | None = None  # null: the cluster's default
    account: str | None = None  # who pays
    qos: str | None = None  # quality of service
    nodes: int = 1  # how many machines
    gpus_per_node: int = 1  # and a task for each; 0 trains on CPUs
    tasks_per_node: int | None = None  # null: one per GPU; for CPUs how many processes
    cpus_per_task: int = 8  # for the loader's processes
    mem: str | None = None  # per node, as in 64GB; null: the cluster's default
    time: str = "24:00:00"  # minutes, HH:MM:SS or D-HH:MM:SS; the job is requeued when it is up
    constraint: str | None = None  # features that nodes must have
    exclude: str | None = None  # nodes to avoid, as in gpu[3-4],gpu9
    array_parallelism: int = 16  # trials of a sweep that may run at once
    signal_delay_s: int = 120  # seconds before its time is up that a job is warned, to save and be requeued
    nodes_download: bool = False  # whether nodes have a network to fetch missing weights by
    setup: list[str] = field(default_factory=list)  # shell lines before training, as in [module load cuda]
    extra: dict[str, Any] = field(default_factory=dict)  # further options of sbatch, as in {reservation: course}

    @property
    def tasks(self) -> int:
        """Tasks on each node."""
        return self.tasks_per_node if self.tasks_per_node is not None else max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        minutes = parse_minutes(self.time)
        assert minutes is not None
        return minutes

    def problems(self) -> Iterator[str]:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_task", 1), ("array_parallelism", 1)):
            if getattr(self, name) < least:
                yield f"slurm.{name} must be at least {least}"
        if self.tasks_per_node is not None and self.tasks_per_node < 1:
            yield "slurm.tasks_per_node must be at least 1, or null for one per GPU"
        elif self.gpus_per_node > 0 and self.tasks != self.gpus_per_node:
            why = "each task needs one of its own" if self.tasks > self.gpus_per_node else "a task uses one of them"
            yield (
                f"slurm.tasks_per_node={self.tasks_per_node} with slurm.gpus_per_node={self.gpus_per_node}: {why}, so "
                f"leave tasks_per_node out, or make them equal"
            )
        minutes = parse_minutes(self.time)
        if minutes is None or minutes < 1:
            yield f"slurm.time={self.time} is no time limit; give minutes, HH:MM:SS or D-HH:MM:SS"
        elif self.signal_delay_s < 1:
            yield "slurm.signal_delay_s must be at least 1"
        elif self.signal_delay_s + EARLY_S >= 60 * minutes:
            yield (
                f"slurm.signal_delay_s={self.signal_delay_s}: Slurm may warn {EARLY_S} s earlier still, which is as "
                f"long as slurm.time={self.time}, so the job would be stopped as it begins; use less, or more time"
            )
        if self.mem is not None and not re.fullmatch(r"0|\d+[KMGT]B?", self.mem, re.IGNORECASE):
            yield f"slurm.mem={self.mem} is no amount of memory; write it as 64GB, or 0 for all that a node has"
        for option in self.extra:
            key = KEY_OF.get(option.replace("_", "-"))
            if key is not None:
                yield f"slurm.extra.{option}: use slurm.{key}"

    def parameters(self, name: str) -> dict[str, Any]:
        """For submitit's AutoExecutor."""
        extra = {"requeue": True, **self.extra}
        found: dict[str, Any] = {
            "name": name,
            "timeout_min": self.minutes,
            "nodes": self.nodes,
            "tasks_per_node": self.tasks,
            "cpus_per_task": self.cpus_per_task,
            "stderr_to_stdout": True,
            "slurm_signal_delay_s": self.signal_delay_s,
            "slurm_array_parallelism": self.array_parallelism,
            "slurm_additional_parameters": {k: v for k, v in extra.items() if v is not None and v is not False},
        }
        if self.gpus_per_node:
            found["gpus_per_node"] = self.gpus_per_node
        for key in ("partition", "account", "qos", "mem", "constraint", "exclude"):
            value = getattr(self, key)
            if value is not None:
                found[f"slurm_{key}"] = value
        return found


def parse_minutes(text: str) -> int | None:
    """Slurm's ways to write a time: `90`, `90:00`, `1:30:00`, `1-12`, `1-12:30`, `1-12:30:00`; seconds round up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + -(-seconds // 60)
