"""The callable that submitit pickles for a job.

Module, name and fields of `Training` must not change: a resumed search submits it to the code snapshot of the version
that began the search.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from distil_tl.utils.command import restart_process
from distil_tl.utils.errors import EXIT_RESTART
from launch.task import train_and_requeue


@dataclass(frozen=True)
class Training:
    """One task of a submitted job.

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
        local = submitit.JobEnvironment().cluster != "slurm"
        status = train([self.config]) if local else train_and_requeue([self.config])
        if status == EXIT_RESTART:
            restart_process()
        if status != 0 and not local:
            raise SystemExit(status)
        return status


def export_ranks() -> None:
    """Set torchrun's environment variables in a task of a local job. Under Slurm, training reads Slurm's own."""
    import submitit

    job = submitit.JobEnvironment()
    if job.cluster == "local" and job.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # some machines can't resolve their own host name
