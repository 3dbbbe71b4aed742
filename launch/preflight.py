"""Checks before anything is submitted: configuration, resources, weights, and whether the run directory is in use."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.training.config import COMPILE
from distil_tl.utils.args import refuse
from distil_tl.utils.errors import UserError
from distil_tl.utils.import_path import is_installed
from launch.evidence import ask_slurm, gather_evidence
from launch.local_job import is_job_alive
from launch.run_status import decide_state
from launch.slurm_config import SlurmConfig


def check_submission(config: Config, slurm: SlurmConfig, cluster: str) -> None:
    """Check everything that can be known before a job starts.

    Raises:
        UserError: lists all problems.
    """
    refuse(submission_problems(config, slurm, cluster))


def submission_problems(config: Config, slurm: SlurmConfig, cluster: str) -> list[str]:
    """All problems that can be known before a job starts."""
    problems = list(slurm.problems())
    world_size = slurm.world_size if not problems else 1
    problems += configuration.problems(without_device(config) if cluster == "slurm" else config, world_size)
    problems += _cluster_problems(config, slurm, cluster)
    return [*problems, *_weights_problems(config, slurm, cluster)]


def without_device(config: Config) -> Config:
    """The configuration without what only a compute node can check: device, backend, and a compiler."""
    device, backend = config.distributed.device, config.distributed.backend
    distributed = dataclasses.replace(
        config.distributed,
        device="auto" if device == "cuda" else device,
        backend="auto" if backend == "nccl" and device != "cpu" else backend,
    )
    compile = "none" if config.compile in COMPILE else config.compile
    return dataclasses.replace(config, distributed=distributed, compile=compile)


def _cluster_problems(config: Config, slurm: SlurmConfig, cluster: str) -> Iterator[str]:
    if not is_installed("submitit"):
        yield "launch needs submitit: pip install 'distil_tl[slurm]'"
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if cluster == "slurm" and missing:
        yield f"there is no {missing[0]} on this machine; submit from a login node, or use --cluster local"
    if "%" in str(config.run_dir):
        yield f"run_dir={config.run_dir} contains %, which Slurm replaces in file names; use another name"
    if cluster != "slurm" and slurm.nodes > 1:
        yield f"slurm.nodes={slurm.nodes} with --cluster {cluster}, which uses only this machine; use slurm.nodes=1"
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if cluster == "local" and 0 < len(visible) < slurm.gpus:
        yield (
            f"slurm.gpus_per_node={slurm.gpus_per_node}, but CUDA_VISIBLE_DEVICES={','.join(visible)} allows only "
            f"{len(visible)}; use a smaller number, or unset it"
        )
    if cluster == "debug" and slurm.tasks > 1:
        yield "--cluster debug is one process; use slurm.gpus_per_node=1, or --cluster local"


def _weights_problems(config: Config, slurm: SlurmConfig, cluster: str) -> Iterator[str]:
    if cluster != "slurm" or slurm.nodes_download or list(config.model.problems()):
        return
    from distil_tl.models import weight_sources  # imports torch

    weights = weight_sources.missing_weights(config.model)
    if weights is not None:
        yield (
            f"the weights of {config.model.name} ({weights}) are not on this machine, and compute nodes may have no "
            f"network; run `distil-tl prefetch` with the same arguments first, or set slurm.nodes_download=true"
        )


def refuse_active_run(
    run_dir: Path, elsewhere: str = "choose another run_dir", *, assume_ended: bool = False, dry_run: bool = False
) -> None:
    """Check that no job or process uses the run directory, or may use it.

    Args:
        elsewhere: how to use another folder, for messages.
        assume_ended: what can't be checked has ended, as the user knows.
        dry_run: only print a note about what can't be checked.

    Raises:
        UserError: a job or process does, or that can't be checked; the message names it.
    """
    queue, why = ask_slurm([run_dir])
    seen = gather_evidence(run_dir, queue)
    state, detail = decide_state(seen)
    job, record, attempt = seen.job, seen.record, seen.attempt or {}
    if record is not None and is_job_alive(record):
        raise UserError(f"local job {record['job_id']} is using {run_dir}; wait until it ends, or {elsewhere}")
    if job is not None and job.is_active:
        raise UserError(
            f"job {job.id} ({job.state}) is using {run_dir}; wait until it ends, run `scancel {job.id}`, or {elsewhere}"
        )
    if state == "running" and detail is None:
        raise UserError(
            f"{run_dir} is in use: process {attempt['pid']} on {attempt['host']} has been training there since "
            f"{attempt['started_at']}. Wait for it, end it with `kill {attempt['pid']}`, or {elsewhere}"
        )
    if state in ("running", "unknown") and not assume_ended:
        certain = "has written lately" if state == "running" else "may be training"
        text = f"the run in {run_dir} {certain}, and can't be checked: {detail}{f' ({why})' if why else ''}"
        if not dry_run:
            raise UserError(f"{text}. If you know that it has ended, add --assume-ended; or {elsewhere}")
        sys.stderr.write(f"launch: {text}\n")
