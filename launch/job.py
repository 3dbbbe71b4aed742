"""What runs in each task of a submitted job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distil_tl.utils.errors import EXIT_PREEMPTED
from launch.squeue import SlurmUnavailableError, requeue, state_of


@dataclass(frozen=True)
class Training:
    """Train a configuration, from the folder in which it was submitted. What submitit pickles."""

    config: str
    cwd: str

    def __call__(self) -> int:
        import submitit

        from distil_tl.train import main

        os.chdir(self.cwd)  # relative paths mean what they meant there
        export_ranks()
        # The Slurm job that one of this machine was started in, such as a notebook's, is not its to requeue.
        submitted = submitit.JobEnvironment().cluster == "slurm"
        status = train_and_requeue([self.config]) if submitted else main([self.config])
        if status != 0 and submitted:
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
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # not all machines can look up their own name


def requeue_if_running(environ: Mapping[str, str]) -> str:
    """Put a job that was warned, and has saved, back into the queue; what was done, as a word for the log.

    State first: Slurm requeues a preempted job itself, and requeueing one that was cancelled would bring it back.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return "no Slurm job"
    if "SLURM_ARRAY_JOB_ID" in environ:  # one task has the array's own number, and by it all of them would be requeued
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        state = state_of(job)
        if state == "RUNNING":
            requeue(job)
            said = f"job {job} goes back into the queue"
        else:
            said = f"job {job} is {state or 'no longer known'}, and is left to Slurm"
    except SlurmUnavailableError as error:
        said = f"job {job} can't be requeued ({error}); submit it again to go on"
    sys.stderr.write(f"launch: {said}\n")
    sys.stderr.flush()
    return said
