"""Whether the cluster could ever run a job: `sbatch --test-only`, asked before anything is submitted."""

from __future__ import annotations

import re
import subprocess
import sys

from distil_tl.utils.errors import UserError
from launch.executor import without_slurm_variables
from launch.partitions import Partition, nodes_for, read_partitions
from launch.slurm_config import SlurmConfig, parse_minutes

TIMEOUT_S = 60
# Answers about now, not about the job.
_FOR_NOW = re.compile(r"busy|temporar|try again|timed out|contact|socket|connection|not responding", re.IGNORECASE)
_NO_NODES = "node configuration is not available"  # also while too many of the nodes are down


def refuse_impossible(script: str, slurm: SlurmConfig) -> None:
    """Check that Slurm could run the job of a batch script. Where it can't be asked, only print a warning.

    Raises:
        UserError: it could not, with Slurm's own reason.
    """
    partitions = read_partitions(slurm.partition)
    reason = ask_slurm(script)
    if reason is not None and not (_NO_NODES in reason and _only_down(slurm, partitions)):
        raise UserError(
            f"this cluster can't run the job: {reason} (sbatch --test-only). Change the keys of `slurm`, or add "
            f"--no-test to submit it all the same"
        )
    limits = [parse_minutes(partition.limit) for partition in partitions]
    if slurm.qos is None and limits and all(limit is not None and limit < slurm.minutes for limit in limits):
        shown = ", ".join(f"{partition.limit} in {partition.name}" for partition in partitions)
        raise UserError(f"slurm.time={slurm.time} is above the limit of the partition ({shown}); use a shorter time")


def ask_slurm(script: str) -> str | None:
    """Slurm's reason why it can't run a script; None if it can, or if it gave no answer, with a warning."""
    try:
        with without_slurm_variables():
            done = subprocess.run(
                ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(str(error))
        return None
    if done.returncode == 0:
        return None
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in done.stderr.splitlines()]
    text = "; ".join(dict.fromkeys(line for line in lines if line)) or f"exit status {done.returncode}"
    if "allocation failure" not in text or _FOR_NOW.search(text):
        _warn(text)
        return None
    return text.replace("allocation failure: ", "")


def _only_down(slurm: SlurmConfig, partitions: list[Partition]) -> bool:
    """Whether there are enough such nodes, but some are down or drained now: then the job waits for them."""
    fitting = [nodes_for(slurm, partition) for partition in partitions]
    if not any(partition.has_down for partition in partitions) or not any(n >= slurm.nodes for n in fitting):
        return False
    _warn("nodes are down or drained, and the job waits for them")
    return True


def _warn(why: str) -> None:
    sys.stderr.write(f"launch: sbatch --test-only did not say that Slurm can run the job now: {why}\n")
