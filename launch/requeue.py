"""The requeue rule: which job goes back into the queue after its run was preempted and has saved."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from time import monotonic, sleep

from distil_tl.utils.signals import STOP_SIGNALS
from launch.squeue import SlurmUnavailableError, is_installed, job_state, requeue_job

PATIENCE = 90.0  # seconds; the other ranks wait somewhat longer for rank 0, which requeues the job
LONGEST = 10.0  # seconds between two attempts


def requeue_if_running(environ: Mapping[str, str], patience: float = PATIENCE) -> str:
    """Requeue this process's Slurm job if squeue calls it RUNNING. Returns the log message.

    While Slurm does not answer, for example because its controller is restarted, it is asked again for `patience`
    seconds. In any other state the job is left as it is: Slurm requeues a preempted job itself, and `scontrol requeue`
    would bring back a cancelled one. A job that runs again already was requeued by another process of this start.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return "no Slurm job"
    if "SLURM_ARRAY_JOB_ID" in environ:  # the job id of one task is also that of the array, which requeues all tasks
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    # Slurm may send a signal to all processes of a job, and squeue and scontrol would die of it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        own_start = environ.get("SLURM_RESTART_COUNT", "")
        message = _keep_trying(job, int(own_start) if own_start.isdigit() else 0, monotonic() + patience)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sys.stderr.write(f"launch: {message}\n")
    sys.stderr.flush()
    return message


def _keep_trying(job: str, own_start: int, deadline: float) -> str:
    pause = 1.0
    while True:
        try:
            return _requeue(job, own_start)
        except SlurmUnavailableError as error:
            if not is_installed() or monotonic() + pause > deadline:
                return f"job {job} can't be requeued ({error}); submit it again to resume"
            sys.stderr.write(f"launch: {error}; trying again\n")
            sleep(pause)
            pause = min(2 * pause, LONGEST)


def _requeue(job: str, own_start: int) -> str:
    state, restarts = job_state(job)
    if state == "RUNNING" and restarts != own_start:
        return f"job {job} was requeued already and runs again, so it is not requeued"
    if state == "RUNNING":
        requeue_job(job)
        return f"job {job} is requeued"
    return f"job {job} is {state or 'no longer known to Slurm'}, so it is not requeued"
