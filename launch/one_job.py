"""Submission of one job that works in a folder of its own: a run, or a selection of a backbone."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_tl.utils.files import write_atomic
from launch.args import print_line
from launch.executor import describe_resources, make_executor, sbatch_script
from launch.local_job import start_recorded, wait_for_job
from launch.preflight import refuse_active_run
from launch.records import read_open_submissions
from launch.slurm_config import SlurmConfig
from launch.snapshot import take_snapshot
from launch.submission import submit_to_slurm, submitting
from launch.test_only import refuse_impossible

CONFIG = "slurm/config.yaml"  # in the folder: what the job reads


@dataclass(frozen=True)
class How:
    """The options of a submission.

    Attributes:
        cluster: slurm, local or debug.
        dry_run: prints the batch script, and submits nothing.
        assume_ended: submits a run whose state can't be checked, too.
        no_test: does not ask Slurm first whether it could run the job.
        print_id: writes the job id for scripts.
    """

    cluster: str
    dry_run: bool
    assume_ended: bool
    no_test: bool
    print_id: Callable[[str], None]

    @classmethod
    def of(cls, options: argparse.Namespace, print_id: Callable[[str], None]) -> How:
        """As given on the command line: see `args.add_job_options`."""
        return cls(options.cluster, options.dry_run, options.assume_ended, options.no_test, print_id)


@dataclass(frozen=True)
class Job:
    """A job to submit.

    Attributes:
        folder: the run directory, or that of the selection.
        task: what each process of the job calls.
        config: the text of its configuration, to be written to CONFIG.
        elsewhere: how to use another folder, for messages.
    """

    folder: Path
    task: Callable[[], int]
    config: str
    slurm: SlurmConfig
    elsewhere: str


def refuse_used(folder: Path, how: How, elsewhere: str) -> None:
    """Raise UserError if a job or process uses the folder; complete earlier submissions from it first."""
    if not how.dry_run and read_open_submissions(folder):  # of a command that was killed
        with submitting(folder):
            pass
    refuse_active_run(folder, elsewhere, assume_ended=how.assume_ended, dry_run=how.dry_run)


def submit_job(job: Job, how: How) -> int:
    """Submit a job, or print its batch script. Waits for a local one. Returns 0, or the exit status of a local job.

    Raises:
        UserError: sbatch refuses it, or its folder is used. Nothing was submitted.
        WriteError: it is submitted, but can't be recorded.
    """
    folder, slurm, cluster = job.folder, job.slurm, how.cluster
    if how.dry_run:
        print_line(sbatch_script(folder, slurm, cluster, name=folder.name))
        return 0
    if cluster == "slurm" and not how.no_test:
        refuse_impossible(sbatch_script(folder, slurm, cluster, name=folder.name), slurm)
    with submitting(folder) as lock:
        refuse_active_run(folder, job.elsewhere, assume_ended=how.assume_ended)
        write_atomic(folder / CONFIG, job.config)
        executor = make_executor(folder, take_snapshot(folder), slurm, cluster, name=folder.name)
        if cluster == "slurm":
            (started,) = submit_to_slurm(executor, folder, [folder], [job.task], lock)
        else:
            started = start_recorded(executor, folder, job.task, cluster)
    how.print_id(str(started.job_id))
    print_submitted(started, folder, describe_resources(slurm, cluster))
    return 0 if cluster == "slurm" else wait_for_job(started, cluster)


def print_submitted(job: Any, folder: Path, resources: str) -> None:
    """What was submitted, and how to monitor it."""
    print_line(f"submitted job {job.job_id}: {folder}, {resources}")
    print_line(f"monitor with: python -m launch.status {shlex.quote(str(folder))}")
    print_line(f"output: {job.paths.stdout.parent}/{job.paths.stdout.name.replace('_0_log', '_TASK_log')}")
