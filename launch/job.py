"""The callables that submitit pickles for jobs.

Module, name and fields of `Training` must not change: a resumed search submits it to the code snapshot of the version
that began the search.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distil_tl.utils.command import restart_process
from distil_tl.utils.errors import EXIT_RESTART
from launch.task import requeue_if_preempted, train_and_requeue


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
        from distil_tl.train import main as train

        return run_task(self.cwd, lambda: train([self.config]), lambda: train_and_requeue([self.config]))


@dataclass(frozen=True)
class Selection:
    """One task of a submitted selection of a backbone.

    Attributes:
        arguments: of `distil-tl select`.
        folder: of its results.
        cwd: folder in which the job was submitted; relative paths are relative to it.
    """

    arguments: tuple[str, ...]
    folder: str
    cwd: str

    def __call__(self) -> int:
        """Select, and return the exit status, as `Training` does."""
        from launch.selection_job import select_and_record

        def select() -> int:
            return select_and_record(self.arguments, Path(self.folder))

        return run_task(self.cwd, select, lambda: requeue_if_preempted(select))


def run_task(cwd: str, alone: Callable[[], int], requeued: Callable[[], int]) -> int:
    """Run a task of a job: `requeued` in a job of Slurm, `alone` in others. Returns, or ends with, its exit status."""
    import submitit

    os.chdir(cwd)
    export_ranks()
    # A local job may run inside a Slurm job, such as that of a notebook, which it must not requeue.
    local = submitit.JobEnvironment().cluster != "slurm"
    status = alone() if local else requeued()
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
