"""Submit a run: `python -m launch.submit CONFIG.yaml slurm.nodes=2 slurm.gpus_per_node=8 key=value ...`.

Into RUN_DIR go a copy of the code, the resolved configuration and the script that sbatch got; the job trains there, is
warned before its time is up, saves, and goes back into the queue until it is done.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.models.transfer import missing_weights
from distil_tl.rundir.directory import find_start
from distil_tl.rundir.lock import FILE as ATTEMPT
from distil_tl.rundir.lock import read_attempt
from distil_tl.utils.args import refuse, to_yaml
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_FAULT, EXIT_PREEMPTED, UserError
from distil_tl.utils.files import write_atomic
from distil_tl.utils.log import setup_console
from launch import args as options
from launch.args import say
from launch.job import Training
from launch.records import read_record, record
from launch.run_status import is_starting
from launch.slurm_config import SlurmConfig
from launch.snapshot import snapshot_path, take_snapshot
from launch.squeue import SlurmUnavailableError, queued

CLUSTERS = ("slurm", "local", "debug")


def main(args: Sequence[str] | None = None) -> int:
    parser = options.argument_parser("python -m launch.submit", __doc__)
    parser.add_argument("--cluster", choices=CLUSTERS, default="slurm", help="local: processes of this machine")
    parser.add_argument("--dry-run", action="store_true", help="print the script for sbatch, and do nothing")
    known, rest = parser.parse_known_args(args)
    return run_command("launch.submit", lambda: submit(rest, known.cluster, dry_run=known.dry_run))


def submit(args: Sequence[str], cluster: str = "slurm", *, dry_run: bool = False) -> int:
    """Check a run, and submit it, or say how it would be. The exit status, of the job where that is waited for.

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
    if find_start(config, source).completed and not dry_run:
        say(f"{run_dir} holds this run, completed; for another one change the seed or run_dir")
        return 0
    if config.resume == "never":  # has been seen to, and the job goes on with what is its own when it is requeued
        source.resume = "auto"
    if dry_run:
        say(script(run_dir, slurm, cluster, name=run_dir.name))
        return 0
    path = run_dir / "slurm" / "config.yaml"
    make_private(path.parent)
    write_atomic(path, to_yaml(source))
    executor = executor_for(run_dir, take_snapshot(run_dir), slurm, cluster, name=run_dir.name)
    (job,) = start(executor, [Training(str(path), str(Path.cwd()))])
    (run_dir / "summary.json").unlink(missing_ok=True)  # it stands for an attempt that is over
    record(run_dir, job.job_id, cluster)
    say(f"job {job.job_id} will train in {run_dir}, on {describe(slurm, cluster)}")
    say(f"look after it: python -m launch.status {shlex.quote(str(run_dir))}")
    say(f"its output: {job.paths.stdout.parent}/{job.paths.stdout.name.replace('_0_log', '_TASK_log')}")
    return 0 if cluster == "slurm" else wait_here(job, cluster)


def preflight(config: Config, slurm: SlurmConfig, cluster: str) -> None:
    """Refuse what can't work on the cluster, all of it together."""
    found = [*slurm.problems()]
    world_size = slurm.world_size if not found else 1
    found += configuration.problems(for_nodes(config) if cluster == "slurm" else config, world_size)
    if importlib.util.find_spec("submitit") is None:
        found.append("launching needs submitit: pip install 'distil_tl[slurm]'")
    absent = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if cluster == "slurm" and absent:
        found.append(f"there is no {absent[0]} on this machine; submit from a login node, or use --cluster local")
    if "%" in str(config.run_dir):
        found.append(f"run_dir={config.run_dir} has a %, in which Slurm sees something to replace; use another name")
    if cluster != "slurm" and slurm.nodes > 1:
        found.append(
            f"slurm.nodes={slurm.nodes} with --cluster {cluster}, which is this machine alone; use slurm.nodes=1"
        )
    chosen = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if cluster == "local" and 0 < len(chosen) < slurm.gpus_per_node:
        found.append(
            f"slurm.gpus_per_node={slurm.gpus_per_node}, but CUDA_VISIBLE_DEVICES={','.join(chosen)} leaves "
            f"{len(chosen)}; ask for less, or unset it"
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


def for_nodes(config: Config) -> Config:
    """A configuration without what only nodes can tell: a login node has no GPU."""
    device, backend = config.distributed.device, config.distributed.backend
    anywhere = dataclasses.replace(
        config.distributed,
        device="auto" if device == "cuda" else device,
        backend="auto" if backend == "nccl" and device != "cpu" else backend,
    )
    return dataclasses.replace(config, distributed=anywhere)


def refuse_live(run_dir: Path) -> None:
    """Refuse a run directory that a waiting or running job will write to."""
    before = read_record(run_dir)
    if before is not None and is_starting(before):
        raise UserError(
            f"job {before['job_id']} of this machine works in {run_dir}; wait for it, or choose another run_dir"
        )
    attempt = read_attempt(run_dir / ATTEMPT)
    jobs = {str(record["job_id"]) for record in (before,) if record is not None and record["cluster"] == "slurm"}
    if attempt is not None and "ended_at" not in attempt and attempt["slurm_job_id"] is not None:
        jobs.add(attempt["slurm_job_id"])
    if not jobs:
        return
    try:
        queue = queued()
    except SlurmUnavailableError as error:
        sys.stderr.write(f"launch: can't ask Slurm whether a job works in {run_dir} ({error})\n")
        return
    for job in sorted(jobs):
        if job in queue and queue[job].lives:
            raise UserError(
                f"job {job} ({queue[job].state}) works in {run_dir}; wait for it, `scancel {job}`, or choose another "
                f"run_dir"
            )


def executor_for(folder: Path, snapshot: Path, slurm: SlurmConfig, cluster: str, *, name: str) -> Any:
    """A submitit executor whose files lie in `folder`/slurm, and whose jobs run the code in `snapshot`."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.WARNING)
    executor = submitit.AutoExecutor(folder / "slurm", cluster=cluster)
    code = shlex.quote(str(snapshot))
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
            parameters["local_setup"] = [_in_bash(setup, executor.folder, slurm.gpus_per_node)]
    executor.update_parameters(**parameters)
    if cluster == "slurm":  # submitit's default is its own name, which a cluster that accounts by such keys refuses
        executor._executor.parameters["wckey"] = None
    return executor


def _in_bash(setup: Sequence[str], folder: Path, gpus: int) -> str:
    """A job of this machine, for submitit's sh to become, so that `setup` means the same as in a batch script."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    lines = [
        "trap '' INT",  # Ctrl-C is for the ranks, who save; submitit's controller would kill them a second later
        *([f"export CUDA_VISIBLE_DEVICES={shlex.quote(chosen)}"] if gpus and chosen is not None else []),
        *setup,
        shlex.join([sys.executable, "-m", "submitit.local._local", str(folder)]),
        "exit $?",  # the controller takes its parent's number for the job's, so bash must not become it
    ]
    return "exec bash -c " + shlex.quote("\n".join(lines))


def script(folder: Path, slurm: SlurmConfig, cluster: str, *, name: str, tasks: int = 1) -> str:
    """What sbatch would get, of one job or an array of several `tasks`."""
    if cluster != "slurm":
        raise UserError(f"--dry-run prints the script for sbatch; --cluster {cluster} has none")
    # submitit has no other way to show a script without submitting it.
    inner = executor_for(folder, snapshot_path(folder), slurm, cluster, name=name)._executor
    if tasks > 1:
        inner.parameters["map_count"] = tasks
    text: str = inner._make_submission_file_text(inner._submitit_command_str, "dry-run")
    return text.rstrip()


def make_private(folder: Path) -> None:
    """A folder open to nobody else: among submitit's files are pickles, which run what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def start(executor: Any, work: Sequence[Callable[[], int]]) -> list[Any]:
    """Hand over to submitit: one job, or one array of several."""
    import submitit

    try:
        with _as_outside_jobs(), executor.batch():
            jobs = [executor.submit(task) for task in work]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refused the job: {str(error).strip()}") from None
    except submitit.core.utils.FailedSubmissionError as error:
        raise UserError(f"sbatch gave no job number: {str(error).splitlines()[0]}") from None
    return jobs


@contextmanager
def _as_outside_jobs() -> Iterator[None]:
    """Without what the Slurm job around us was given, such as memory per CPU: srun would take it for the new one's."""
    around = {}
    if "SLURM_JOB_ID" in os.environ:
        names = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF"]
        around = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(around)


def describe(slurm: SlurmConfig, cluster: str) -> str:
    if cluster != "slurm":
        return f"{slurm.tasks} processes of this machine"
    kind = f"{slurm.gpus_per_node} GPUs" if slurm.gpus_per_node else f"{slurm.tasks} CPU tasks"
    return f"{slurm.nodes} x {kind} for {slurm.time} at a time"


def wait_here(job: Any, cluster: str) -> int:
    """Wait for a job of this machine, which Ctrl-C asks to save and end; its exit status, said where it is not 0."""
    asked = False
    while True:
        try:
            job.wait()
            break
        except KeyboardInterrupt:
            asked = True
            stop_here(job.job_id)
    status = gravest_status(job, cluster, died=EXIT_PREEMPTED if asked else EXIT_FAULT)
    if status == EXIT_PREEMPTED:
        sys.stderr.write("launch: the job was stopped, and the same command goes on with it\n")
        return EXIT_PREEMPTED
    if status != 0:
        sys.stderr.write(f"launch: the job failed; its output is in {job.paths.stdout}\n")
    return status


def gravest_status(job: Any, cluster: str, *, died: int) -> int:
    """The exit status of a job of this machine; `died` is that of a task which left none."""
    found = job.results() if cluster == "debug" else []
    for number in range(0 if cluster == "debug" else job.num_tasks):
        task = job.task(number)
        if not task.paths.result_pickle.exists():
            found.append(died)
        else:
            found.append(EXIT_FAULT if task.exception() is not None else task.result())
    return min((status for status in found if status != 0), default=0)


def stop_here(job_id: str) -> None:
    """Ask the ranks of a job of this machine to save and end. submitit's `cancel` gets no further than their shell."""
    with suppress(OSError):  # it has ended, or this is not Linux, where Ctrl-C reaches the ranks by itself
        for child in Path(f"/proc/{job_id}/task/{job_id}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)  # submitit's controller, which passes it on


if __name__ == "__main__":
    sys.exit(main())
