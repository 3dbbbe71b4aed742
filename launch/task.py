"""Training that requeues its Slurm job: `python -m launch.task [CONFIG.yaml] [key=value ...]`, for batch scripts.

The arguments are those of `python -m distil_tl.train`. The job is requeued when the run was preempted and has saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from distil_tl.config import check_arguments
from distil_tl.utils.command import exit_process
from distil_tl.utils.errors import EXIT_PREEMPTED
from launch.args import split_slurm
from launch.requeue import requeue_if_running


def train_and_requeue(args: Sequence[str]) -> int:
    """Train; if the run was preempted and has saved, rank 0 requeues the Slurm job. Returns the exit status."""
    from distil_tl.train import main as train

    status = train(args)
    if status == EXIT_PREEMPTED and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        requeue_if_running(os.environ)
    return status


def main(args: Sequence[str] | None = None) -> int:
    """`python -m launch.task`: keys of the `slurm` section are ignored, as sbatch has read its own options."""
    _, training = split_slurm(sys.argv[1:] if args is None else args)
    return train_and_requeue(training)


if __name__ == "__main__":
    check_arguments("distil_tl.train", split_slurm(sys.argv[1:])[1])  # before torch is imported
    exit_process(main())
