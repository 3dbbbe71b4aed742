"""The `slurm` section of a configuration: the resources of a job and its options for sbatch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EARLY_S = 60  # Slurm may send the signal before the time limit up to this much early

# Options of sbatch that have their own key here, so that they are checked.
KEY_OF = {
    **{name: name for name in ("partition", "account", "qos", "nodes", "mem", "time", "constraint", "exclude")},
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task"), "gpus_per_node"),  # a task must see its node's GPUs
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "array": "array_parallelism",
    "signal": "signal_delay_s",
    **{name.replace("_", "-"): name for name in ("job_name", "mail_user", "mail_type", "comment", "dependency")},
}
# Options of sbatch whose values launch relies on.
RESERVED = ("output", "error", "open-mode", "parsable", "test-only", "wrap", "wait")
# Short options of srun that stand for one above.
SHORT = {"-n": "ntasks", "-N": "nodes", "-G": "gpus", "-c": "cpus-per-task", "-t": "time", "-o": "output"}
MAIL_TYPES = ("NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "ARRAY_TASKS")
MAIL_TIMES = ("TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50")


@dataclass
class SlurmConfig:
    partition: str | None = None  # null: the cluster's default
    account: str | None = None  # account to charge
    qos: str | None = None  # quality of service
    nodes: int = 1  # number of nodes
    gpus_per_node: int | str = 1  # GPUs per node, as in 4 or a100:4, with one task for each; 0 trains on CPUs
    tasks_per_node: int | None = None  # null: one per GPU; without GPUs, the number of processes
    cpus_per_task: int = 8  # CPU cores per task, for the data loader's processes
    mem: str | None = None  # memory per node, as in 64GB; null: the cluster's default
    time: str = "24:00:00"  # time limit: minutes, HH:MM:SS or D-HH:MM:SS; then the job saves and is requeued
    constraint: str | None = None  # features that nodes must have
    exclude: str | None = None  # nodes to avoid, as in gpu[3-4],gpu9
    array_parallelism: int = 16  # trials of a sweep that may run at once
    signal_delay_s: int = 120  # seconds before the time limit at which a job is signalled to save and be requeued
    nodes_download: bool = False  # whether compute nodes may download missing weights
    setup: list[str] = field(default_factory=list)  # shell lines before training, as in [module load cuda], with set -e
    python: str | None = (
        None  # Python of the job, as in python after `source venv/bin/activate`; null: the one used here
    )
    srun_args: list[str] = field(default_factory=list)  # options of srun, as in [--cpu-bind=cores]
    job_name: str | None = None  # name of the job; null: that of the run directory or sweep
    mail_user: str | None = None  # address for mail about the job
    mail_type: str | None = None  # events that send mail, as in END,FAIL
    comment: str | None = None  # a comment for Slurm's records; some clusters bill by it
    dependency: str | None = None  # jobs to wait for, as in afterok:1234
    profile: str | None = None  # file with the `slurm` section of a cluster, below the keys given here; or its name
    extra: dict[str, Any] = field(default_factory=dict)  # further options of sbatch, as in {reservation: course}

    def __post_init__(self) -> None:
        if isinstance(self.gpus_per_node, str) and self.gpus_per_node.strip().isdigit():
            self.gpus_per_node = int(self.gpus_per_node)

    @property
    def gpus(self) -> int:
        """GPUs on each node, of whatever type."""
        number = str(self.gpus_per_node).rpartition(":")[2]
        return int(number) if re.fullmatch(r"-?\d+", number) else 0

    @property
    def tasks(self) -> int:
        """Tasks on each node."""
        return self.tasks_per_node if self.tasks_per_node is not None else max(1, self.gpus)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """The time limit in minutes."""
        minutes = parse_minutes(self.time)
        assert minutes is not None
        return minutes

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, and how to correct it."""
        for name, minimum in (("nodes", 1), ("cpus_per_task", 1), ("array_parallelism", 1)):
            if getattr(self, name) < minimum:
                yield f"slurm.{name} must be at least {minimum}"
        yield from self._task_problems()
        minutes = parse_minutes(self.time)
        if minutes is None or minutes < 1:
            yield f"slurm.time={self.time} is not a time limit; use minutes, HH:MM:SS or D-HH:MM:SS"
        elif self.signal_delay_s < 1:
            yield "slurm.signal_delay_s must be at least 1"
        elif self.signal_delay_s + EARLY_S >= 60 * minutes:
            yield (
                f"slurm.signal_delay_s={self.signal_delay_s}: Slurm may send the signal {EARLY_S} s earlier still, so "
                f"with slurm.time={self.time} the job could be stopped as soon as it starts; use a shorter delay or a "
                f"longer time limit"
            )
        if self.mem is not None and not re.fullmatch(r"0|\d+[KMGT]B?", self.mem, re.IGNORECASE):
            yield f"slurm.mem={self.mem} is not an amount of memory; use for example 64GB, or 0 for all of a node"
        if self.python is not None and not self.python.strip():
            yield "slurm.python is empty; use for example /shared/venv/bin/python, or null for the one used here"
        yield from self._mail_problems()
        for option in self.extra:
            name = option.replace("_", "-")
            if name in KEY_OF:
                yield f"slurm.extra.{option}: use slurm.{KEY_OF[name]}"
            elif name in RESERVED:
                yield f"slurm.extra.{option}: launch needs its own value; remove it"
        yield from self._srun_problems()

    def _task_problems(self) -> Iterator[str]:
        given = str(self.gpus_per_node)
        if not re.fullmatch(r"-?\d+|[\w.-]+:\d+", given):
            yield f"slurm.gpus_per_node={given} is not a number of GPUs; use for example 4, or a100:4 with a type"
        elif self.gpus < (1 if ":" in given else 0):
            yield f"slurm.gpus_per_node must be at least {1 if ':' in given else 0}"
        if self.tasks_per_node is not None and self.tasks_per_node < 1:
            yield "slurm.tasks_per_node must be at least 1, or null for one per GPU"
        elif self.gpus > 0 and self.tasks != self.gpus:
            why = "each task needs its own GPU" if self.tasks > self.gpus else "a task uses only one GPU"
            yield (
                f"slurm.tasks_per_node={self.tasks_per_node} with slurm.gpus_per_node={given}: {why}; "
                f"leave out tasks_per_node, or use the same number for both"
            )

    def _mail_problems(self) -> Iterator[str]:
        types = [word.strip().upper() for word in (self.mail_type or "").split(",")] if self.mail_type else []
        for word in types:
            if word not in (*MAIL_TYPES, *MAIL_TIMES):
                yield f"slurm.mail_type: {word} is not one of {', '.join((*MAIL_TYPES, *MAIL_TIMES))}"
        if self.mail_user is not None and not types:
            yield "slurm.mail_user without slurm.mail_type sends no mail; add for example slurm.mail_type=END,FAIL"

    def _srun_problems(self) -> Iterator[str]:
        """Options of srun that would change what the job requests. A command, such as a container's, may follow."""
        before = ""
        for word in self.srun_args:
            if not word.startswith("-"):
                if not before.startswith("-") or "=" in before:
                    return
            else:
                name = word[2:].partition("=")[0] if word.startswith("--") else SHORT.get(word[:2], "")
                if name in KEY_OF:
                    yield f"slurm.srun_args: {word}: use slurm.{KEY_OF[name]}"
                elif name in RESERVED:
                    yield f"slurm.srun_args: {word}: launch needs its own value; remove it"
            before = word

    def parameters(self, name: str) -> dict[str, Any]:
        """The parameters of submitit's AutoExecutor for a job called `name`."""
        extra = {"requeue": True, **self.extra}
        parameters: dict[str, Any] = {
            "name": self.job_name or name,
            "timeout_min": self.minutes,
            "nodes": self.nodes,
            "tasks_per_node": self.tasks,
            "cpus_per_task": self.cpus_per_task,
            "stderr_to_stdout": True,
            "slurm_signal_delay_s": self.signal_delay_s,
            "slurm_array_parallelism": self.array_parallelism,
            "slurm_additional_parameters": {k: v for k, v in extra.items() if v is not None and v is not False},
        }
        if self.gpus:
            parameters["gpus_per_node"] = self.gpus
        if isinstance(self.gpus_per_node, str):  # with a type, which submitit knows for Slurm only
            parameters["slurm_gpus_per_node"] = self.gpus_per_node
        keys = ("partition", "account", "qos", "mem", "constraint", "exclude")
        for key in (*keys, "mail_user", "mail_type", "comment", "dependency"):
            value = getattr(self, key)
            if value is not None:
                parameters[f"slurm_{key}"] = value
        if self.srun_args:
            parameters["slurm_srun_args"] = list(self.srun_args)
        return parameters


def parse_minutes(text: str) -> int | None:
    """Minutes of a Slurm time: 90, 90:00, 1:30:00, 1-12, 1-12:30, 1-12:30:00. Rounded up; None if invalid."""
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
