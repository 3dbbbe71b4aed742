"""What runs in each task of a submitted job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distil_tl.errors import EXIT_PREEMPTED
from launch.queue import SlurmUnavailableError, requeue, state_of


@dataclass(frozen=True)
class Training:
    """Train a configuration, from the folder in which it was submitted. What submitit pickles."""

    config: str
    cwd: str

    def __call__(self) -> int:
        os.chdir(self.cwd)  # relative paths mean what they meant there
        export_ranks()
        status = train_and_requeue([self.config])
        if status != 0:
            raise SystemExit(status)
        return status


def train_and_requeue(args: Sequence[str]) -> int:
    """Train; when that was asked to stop, and has saved, see to the Slurm job. The exit status."""
    from distil_tl.train import main

    status = main(args)
    if status == EXIT_PREEMPTED and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        requeue_if_running(os.environ)
    return status


def export_ranks() -> None:
    """What torchrun would say, in a task that submitit started on this machine; Slurm says it itself."""
    import submitit

    job = submitit.JobEnvironment()
    if job.cluster == "local" and job.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def requeue_if_running(environ: Mapping[str, str]) -> str:
    """Put a job that was warned, and has saved, back into the queue; what was done, as a word for the log.

    State first: Slurm requeues a preempted job itself, and requeueing one that was cancelled would bring it back.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return "no Slurm job"
    try:
        state = state_of(job)
        if state == "RUNNING":
            requeue(job)
            said = f"job {job} goes back into the queue"
        else:
            said = f"job {job} is {state}, and is left to Slurm"
    except SlurmUnavailableError as error:
        said = f"job {job} can't be requeued ({error}); submit it again to go on"
    sys.stderr.write(f"launch: {said}\n")
    sys.stderr.flush()
    return said
