"""Slurm as the commands of this machine see it: which partitions there are, and what their nodes have."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from distil_tl.doctor.lines import Report, first_line
from distil_tl.utils.errors import did_you_mean
from distil_tl.utils.processes import run_text

GROUP = "Slurm"
SECONDS = 15.0


@dataclass
class Partition:
    """A partition as sinfo shows it.

    Attributes:
        is_up: whether it accepts jobs.
        gpus: of the node that has most of them.
        cpus: of the node that has most of them.
    """

    is_up: bool = False
    gpus: int = 0
    cpus: int = 0


def read_partitions() -> dict[str, Partition]:
    """The partitions by name.

    Raises:
        OSError, subprocess.SubprocessError: sinfo is missing, fails, or does not answer.
    """
    done = run_text(["sinfo", "--noheader", "--format=%R|%a|%G|%c"], timeout=SECONDS, check=True)
    found: dict[str, Partition] = {}
    for line in done.stdout.splitlines():
        name, state, gres, cpus = (line.strip().split("|") + [""] * 4)[:4]
        partition = found.setdefault(name, Partition())
        partition.is_up = partition.is_up or state == "up"
        gpus = sum(int(number) for number in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", gres))
        partition.gpus = max(partition.gpus, gpus)
        partition.cpus = max(partition.cpus, int(re.match(r"\d*", cpus)[0] or 0))  # type: ignore[index]
    return found


def judge_partition(report: Report, name: str | None, gpus_per_node: int, cpus_per_node: int) -> None:
    """Lines about the partition of a job, and whether its nodes have what the job wants.

    Args:
        name: None for the cluster's default.
    """
    if shutil.which("sinfo") is None:
        report.warn(GROUP, "sinfo", "there is no sinfo on this machine, so the partition can't be checked")
        return
    try:
        partitions = read_partitions()
    except subprocess.TimeoutExpired:
        report.warn(GROUP, "sinfo", f"Slurm did not answer within {SECONDS:g} s")
        return
    except subprocess.CalledProcessError as error:
        report.warn(GROUP, "sinfo", f"Slurm does not answer: {first_line(error.stderr or str(error))}")
        return
    if name is None:
        report.ok(GROUP, "slurm.partition", f"the default one; there are {', '.join(sorted(partitions))}")
        return
    problems = []
    for one in name.split(","):
        partition = partitions.get(one)
        if partition is None:
            hint = did_you_mean(one, partitions) or f"; there are {', '.join(sorted(partitions))}"
            problems.append(f"there is no partition {one}{hint}")
        elif not partition.is_up:
            problems.append(f"partition {one} is down")
        elif gpus_per_node > partition.gpus:
            problems.append(f"slurm.gpus_per_node={gpus_per_node}, but a node of {one} has at most {partition.gpus}")
        elif cpus_per_node > partition.cpus:
            problems.append(
                f"the tasks of a node want {cpus_per_node} CPUs, but a node of {one} has at most {partition.cpus}; "
                f"lower slurm.cpus_per_task"
            )
    for problem in problems:
        report.fail(GROUP, "slurm.partition", problem)
    if not problems:
        report.ok(GROUP, "slurm.partition", name)
