"""Training that requeues its Slurm job: `python -m launch.task [CONFIG.yaml] [key=value ...]`, for batch scripts.

The arguments are those of `python -m distil_tl.train`. The job is requeued when the run was preempted and has saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from distil_tl.arguments import check_arguments
from distil_tl.utils.command import ended_because_of_others, exit_process
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED, EXIT_USER_ERROR
from distil_tl.utils.job_outcome import FAILED, MOST_PREEMPTED, PREEMPTED, REFUSED, is_stuck, note, notes
from launch.args import split_slurm
from launch.requeue import requeue_if_running


def train_and_requeue(args: Sequence[str]) -> int:
    """Train; if the run was preempted and has saved, rank 0 requeues the Slurm job. Returns the exit status."""
    from distil_tl.train import main as train

    return requeue_if_preempted(lambda: train(args))


def requeue_if_preempted(command: Callable[[], int]) -> int:
    """Run a command; if it was preempted and has saved, rank 0 requeues the Slurm job. Returns its exit status.

    How it ends is noted for the batch script, which requeues a job that was killed.
    """
    status = command()
    if status == EXIT_PREEMPTED and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        _requeue()
    elif status == EXIT_USER_ERROR:
        note(REFUSED)
    elif status == EXIT_FAULT and not ended_because_of_others():
        note(FAILED)
    return status


def _requeue() -> None:
    """Requeue the job, unless Slurm stopped this rank because of another one that had failed."""
    if notes()[-1:] in ([FAILED], [REFUSED]):
        return
    if is_stuck():
        note(FAILED)
        sys.stderr.write(
            f"launch: the job is not requeued: it was stopped {MOST_PREEMPTED} times before it saved a checkpoint\n"
        )
        return
    note(PREEMPTED)  # first: where this process has no squeue, the batch script requeues the job
    requeue_if_running(os.environ)


def main(args: Sequence[str] | None = None) -> int:
    """`python -m launch.task`: keys of the `slurm` section are ignored, as sbatch has read its own options."""
    _, training = split_slurm(sys.argv[1:] if args is None else args)
    return train_and_requeue(training)


if __name__ == "__main__":
    try:
        check_arguments("distil_tl.train", split_slurm(sys.argv[1:])[1])  # before torch is imported
    except SystemExit as ended:
        if ended.code == EXIT_USER_ERROR:
            note(REFUSED)
        raise
    exit_process(main())
