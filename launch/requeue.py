"""The requeue rule: which job goes back into the queue after its run was preempted and has saved."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from launch.squeue import SlurmUnavailableError, job_state, requeue_job


def requeue_if_running(environ: Mapping[str, str]) -> str:
    """Requeue this process's Slurm job if squeue calls it RUNNING. Returns the log message.

    In any other state the job is left as it is: Slurm requeues a preempted job itself, and `scontrol requeue` would
    bring back a cancelled one.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return "no Slurm job"
    if "SLURM_ARRAY_JOB_ID" in environ:  # the job id of one task is also that of the array, which requeues all tasks
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        state = job_state(job)
        if state == "RUNNING":
            requeue_job(job)
            message = f"job {job} is requeued"
        else:
            message = f"job {job} is {state or 'no longer known to Slurm'}, so it is not requeued"
    except SlurmUnavailableError as error:
        message = f"job {job} can't be requeued ({error}); submit it again to resume"
    sys.stderr.write(f"launch: {message}\n")
    sys.stderr.flush()
    return message
