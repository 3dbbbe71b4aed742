"""Submit a run: `python -m launch.submit CONFIG.yaml slurm.nodes=2 slurm.gpus_per_node=8 key=value ...`.

Into RUN_DIR go a copy of the code, the resolved configuration and the script that sbatch got; the job trains there, is
warned before its time is up, saves, and goes back into the queue until it is done.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distil_tl import config as configuration
from distil_tl.attempt import FILE as ATTEMPT
from distil_tl.attempt import read_attempt
from distil_tl.commands import run_command
from distil_tl.config import Config
from distil_tl.errors import UserError
from distil_tl.files import write_atomic
from distil_tl.log import logger, setup_console
from distil_tl.models import missing_weights
from distil_tl.settings import refuse, to_yaml
from launch import options
from launch.job import Training
from launch.queue import SlurmUnavailableError, queued
from launch.records import read_record, record
from launch.resources import SlurmConfig
from launch.snapshot import snapshot_path, take_snapshot

CLUSTERS = ("slurm", "local", "debug")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launch.submit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cluster", choices=CLUSTERS, default="slurm", help="local: processes of this machine")
    parser.add_argument("--dry-run", action="store_true", help="print the script for sbatch, and do nothing")
    known, rest = parser.parse_known_args(args)
    return run_command("launch.submit", lambda: submit(rest, known.cluster, dry_run=known.dry_run))


def submit(args: Sequence[str], cluster: str = "slurm", *, dry_run: bool = False) -> None:
    """Check a run, and submit it, or say how it would be.

    Raises:
        UserError: when it can't work, or sbatch refuses it. Nothing was submitted then.
    """
    setup_console(True)
    config, source, slurm = options.read(args)
    assert config.run_dir is not None
    run_dir = Path(config.run_dir).absolute()
    source.run_dir = str(run_dir)
    preflight(config, slurm, cluster)
    refuse_live(run_dir)
    executor = executor_for(run_dir, slurm, cluster, name=run_dir.name)
    if dry_run:
        sys.stdout.write(script(executor, cluster))
        return
    path = run_dir / "slurm" / "config.yaml"
    make_private(path.parent)
    write_atomic(path, to_yaml(source))
    take_snapshot(run_dir)
    (job,) = start(executor, [Training(str(path), str(Path.cwd()))])
    record(run_dir, job.job_id, cluster)
    logger.info("job %s will train in %s, on %s", job.job_id, run_dir, describe(slurm, cluster))
    logger.info("look after it: python -m launch.status %s", shlex.quote(str(run_dir)))
    logger.info("its output: %s", str(job.paths.stdout).replace("_0_log", "_TASK_log"))
    if cluster != "slurm":
        logger.info("waiting for its end")
        job.wait()
        finish_local(job)


def preflight(config: Config, slurm: SlurmConfig, cluster: str) -> None:
    """Refuse what can't work on the cluster, all of it together."""
    found = [*slurm.problems()]
    world_size = slurm.world_size if not found else 1
    found += configuration.problems(config, world_size)
    if cluster == "slurm" and shutil.which("sbatch") is None:
        found.append("there is no sbatch on this machine; submit from a login node, or use --cluster local")
    if cluster != "slurm" and slurm.nodes > 1:
        found.append(
            f"slurm.nodes={slurm.nodes} with --cluster {cluster}, which is this machine alone; use slurm.nodes=1"
        )
    if cluster == "debug" and slurm.tasks > 1:
        found.append("--cluster debug is one process; use slurm.gpus_per_node=1, or --cluster local")
    weights = missing_weights(config.model) if not config.model.problems() else None
    if weights is not None and cluster == "slurm" and not slurm.nodes_download:
        found.append(
            f"the weights of {config.model.name} ({weights}) are not on this machine, and compute nodes may have no "
            f"network; run `distil-tl prefetch` with the same arguments first, or set slurm.nodes_download=true"
        )
    refuse(found)


def refuse_live(run_dir: Path) -> None:
    """Refuse a run directory that a waiting or running job will write to."""
    before = read_record(run_dir)
    attempt = read_attempt(run_dir / ATTEMPT)
    jobs = {str(record["job_id"]) for record in (before,) if record is not None and record["cluster"] == "slurm"}
    if attempt is not None and "ended_at" not in attempt and attempt["slurm_job_id"] is not None:
        jobs.add(attempt["slurm_job_id"])
    if not jobs:
        return
    try:
        queue = queued()
    except SlurmUnavailableError as error:
        logger.warning("can't ask Slurm whether a job works in %s (%s)", run_dir, error)
        return
    for job in sorted(jobs):
        if job in queue and queue[job].lives:
            raise UserError(
                f"job {job} ({queue[job].state}) works in {run_dir}; wait for it, `scancel {job}`, or choose another "
                f"run_dir"
            )


def executor_for(folder: Path, slurm: SlurmConfig, cluster: str, *, name: str) -> Any:
    """A submitit executor whose files lie in `folder`/slurm, and whose jobs run the snapshot in `folder`."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.WARNING)
    executor = submitit.AutoExecutor(folder / "slurm", cluster=cluster)
    code = shlex.quote(str(snapshot_path(folder)))
    setup = [
        *slurm.setup,
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",  # as torchrun does: the loader has processes of its own
        # `python -m` looks in the current folder first, and then here.
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"cd {code}",
    ]
    parameters = slurm.parameters(name)
    if cluster == "slurm":
        # Since Slurm 22.05 srun does not ask for the CPUs that sbatch was asked for.
        parameters["slurm_setup"] = [*setup, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]
    else:
        parameters = {k: v for k, v in parameters.items() if not k.startswith("slurm_")}
        if cluster == "local":
            parameters["local_setup"] = setup
    executor.update_parameters(**parameters)
    return executor


def script(executor: Any, cluster: str) -> str:
    """What sbatch would get."""
    if cluster != "slurm":
        raise UserError(f"--dry-run prints the script for sbatch; --cluster {cluster} has none")
    inner = executor._executor  # submitit has no other way to show a script without submitting it
    text: str = inner._make_submission_file_text(inner._submitit_command_str, "dry-run")
    return text


def make_private(folder: Path) -> None:
    """A folder open to nobody else: among submitit's files are pickles, which run what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def start(executor: Any, work: Sequence[Callable[[], int]]) -> list[Any]:
    """Hand over to submitit: one job, or one array of several."""
    import submitit

    try:
        with executor.batch():
            jobs = [executor.submit(task) for task in work]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refused the job: {str(error).strip()}") from None
    return jobs


def describe(slurm: SlurmConfig, cluster: str) -> str:
    if cluster != "slurm":
        return f"{slurm.tasks} processes of this machine"
    kind = f"{slurm.gpus_per_node} GPUs" if slurm.gpus_per_node else f"{slurm.tasks} CPU tasks"
    return f"{slurm.nodes} x {kind} for {slurm.time} at a time"


def finish_local(job: Any) -> None:
    """Say how a job of this machine ended."""
    failed = job.exception()
    if failed is not None:
        raise UserError(f"the job failed; its output is in {job.paths.stdout}")


if __name__ == "__main__":
    sys.exit(main())
