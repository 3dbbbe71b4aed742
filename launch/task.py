"""Training inside a Slurm job, which is requeued when the run was preempted and has saved.

`TrainingTask` runs in the jobs that submitit starts. `python -m launch.task [CONFIG.yaml] [key=value ...]` is for batch
scripts; its arguments are those of `python -m distil_tl.train`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from distil_tl.utils.command import exit_process
from distil_tl.utils.errors import EXIT_PREEMPTED
from launch.args import split_slurm
from launch.requeue import requeue_if_running


@dataclass(frozen=True)
class TrainingTask:
    """One task of a submitted job: a callable that submitit pickles.

    Attributes:
        config: path of the configuration to train.
        cwd: folder in which the job was submitted; relative paths are relative to it.
    """

    config: str
    cwd: str

    def __call__(self) -> int:
        """Train, and return the exit status. Under Slurm another status than 0 ends the process."""
        import submitit

        from distil_tl.train import main as train

        os.chdir(self.cwd)
        export_ranks()
        # A local job may run inside a Slurm job, such as that of a notebook, which it must not requeue.
        if submitit.JobEnvironment().cluster != "slurm":
            return train([self.config])
        status = train_and_requeue([self.config])
        if status != 0:
            raise SystemExit(status)
        return status


def train_and_requeue(args: Sequence[str]) -> int:
    """Train; if the run was preempted and has saved, rank 0 requeues the Slurm job. Returns the exit status."""
    from distil_tl.train import main as train

    status = train(args)
    if status == EXIT_PREEMPTED and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        requeue_if_running(os.environ)
    return status


def export_ranks() -> None:
    """Set torchrun's environment variables in a task of a local job. Under Slurm, training reads Slurm's own."""
    import submitit

    job = submitit.JobEnvironment()
    if job.cluster == "local" and job.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # some machines can't resolve their own host name


def main(args: Sequence[str] | None = None) -> int:
    """`python -m launch.task`: keys of the `slurm` section are ignored, as sbatch has read its own options."""
    _, training = split_slurm(sys.argv[1:] if args is None else args)
    return train_and_requeue(training)


if __name__ == "__main__":
    exit_process(main())
