"""Whether the cluster could ever run a job: `sbatch --test-only`, asked before anything is submitted."""

from __future__ import annotations

import re
import subprocess
import sys

from distil_tl.utils.errors import UserError
from distil_tl.utils.processes import run_text
from launch.executor import without_slurm_variables
from launch.partitions import Partition, nodes_for, read_partitions
from launch.slurm_config import SlurmConfig, parse_minutes

TIMEOUT_S = 60
# Answers about now, not about the job.
_FOR_NOW = re.compile(r"busy|temporar|try again|timed out|contact|socket|connection|not responding", re.IGNORECASE)
_NO_NODES = "node configuration is not available"  # also while too many of the nodes are down


def refuse_impossible(script: str, slurm: SlurmConfig) -> None:
    """As `find_obstacle`, with the warning on standard error."""
    warning = find_obstacle(script, slurm)
    if warning is not None:
        sys.stderr.write(f"launch: {warning}\n")


def find_obstacle(script: str, slurm: SlurmConfig) -> str | None:
    """Check that Slurm could run the job of a batch script. Returns a warning if it can't say so now.

    Raises:
        UserError: it could not, with Slurm's own reason.
    """
    partitions = read_partitions(slurm.partition)
    reason, is_final = ask_slurm(script)
    warning = f"sbatch --test-only did not say that Slurm can run the job now: {reason}"
    if reason is not None and _NO_NODES in reason and _are_down(slurm, partitions):
        is_final, warning = False, "nodes that the job needs are down or drained now; it waits for them"
    if is_final:
        raise UserError(
            f"this cluster can't run the job: {reason} (sbatch --test-only). Change the keys of `slurm`, or add "
            f"--no-test to submit it all the same"
        )
    limits = [parse_minutes(partition.limit) for partition in partitions]
    if slurm.qos is None and limits and all(limit is not None and limit < slurm.minutes for limit in limits):
        shown = ", ".join(f"{partition.limit} in {partition.name}" for partition in partitions)
        raise UserError(f"slurm.time={slurm.time} is above the limit of the partition ({shown}); use a shorter time")
    return None if reason is None else warning


def ask_slurm(script: str) -> tuple[str | None, bool]:
    """Slurm's reason why it can't run a script, None if it can; and whether that is final, not about now."""
    try:
        with without_slurm_variables():
            done = run_text(["sbatch", "--test-only"], input=script, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), False
    if done.returncode == 0:
        return None, False
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in done.stderr.splitlines()]
    text = "; ".join(dict.fromkeys(line for line in lines if line)) or f"exit status {done.returncode}"
    is_final = "allocation failure" in text and not _FOR_NOW.search(text)
    return text.replace("allocation failure: ", ""), is_final


def _are_down(slurm: SlurmConfig, partitions: list[Partition]) -> bool:
    """Whether there are enough nodes of the kind that the job needs, but some are down or drained now."""
    enough = any(nodes_for(slurm, partition) >= slurm.nodes for partition in partitions)
    return enough and any(partition.has_down for partition in partitions)
