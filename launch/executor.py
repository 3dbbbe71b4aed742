"""Submission through submitit: jobs on Slurm, on this machine, or in this process."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distil_tl.distributed.config import has_gpu_files
from distil_tl.utils.errors import UserError
from launch.slurm_config import SlurmConfig
from launch.snapshot import snapshot_path

JOB_LINES = Path(__file__).with_name("job.sh")


def make_executor(folder: Path, snapshot: Path, slurm: SlurmConfig, cluster: str, *, name: str) -> Any:
    """A submitit executor for jobs that run the code in `snapshot`; its own files are in `folder`/slurm.

    Args:
        cluster: slurm, local (processes of this machine) or debug (this process).
        name: of the job.
    """
    import submitit

    logging.getLogger("submitit").setLevel(logging.WARNING)
    # Signals wait from the start of Python, which may take long, until training has handlers for them.
    python = slurm.python or shlex.quote(sys.executable)
    pythons = {"slurm_python": f'"${{BLOCK_SIGNALS[@]}}" {python}', "local_python": python}
    chosen = {key: value for key, value in pythons.items() if key.startswith(cluster)}
    executor = submitit.AutoExecutor(folder / "slurm", cluster=cluster, **chosen)
    code = shlex.quote(str(snapshot))
    setup = [
        *setup_lines(slurm),
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",  # as torchrun does; the data loader has its own processes
        "export PYTHONUTF8=1",  # in a locale with another encoding, files of any name can be read only so
        # `python -m` looks first in the current folder, and then in PYTHONPATH.
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"cd {code} || exit 2",
    ]
    parameters = slurm.parameters(name)
    if cluster == "slurm":
        parameters["slurm_setup"] = [
            *JOB_LINES.read_text(encoding="utf-8").splitlines(),
            f"export DISTIL_TL_OUTCOME={shlex.quote(str(executor.folder))}/$SLURM_JOB_ID.outcome",
            *setup,
            # Since Slurm 22.05, srun no longer takes --cpus-per-task from sbatch.
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
            'srun() { watch_run srun "$@"; }',  # submitit's next line calls it
        ]
        # First, so that an option of the user counts. Without it the other tasks of a failed one could run on.
        parameters["slurm_srun_args"] = ["--kill-on-bad-exit=1", *parameters.get("slurm_srun_args", [])]
    else:
        parameters = {k: v for k, v in parameters.items() if not k.startswith("slurm_")}
        if cluster == "local":
            parameters["local_setup"] = [_bash_command(setup, executor.folder, slurm.gpus)]
    executor.update_parameters(**parameters)
    if cluster == "slurm":  # submitit's default is --wckey=submitit, which a cluster that checks such keys refuses
        executor._executor.parameters["wckey"] = None
    return executor


def setup_lines(slurm: SlurmConfig) -> list[str]:
    """The lines of `slurm.setup`; one that fails ends the job, unless the user has turned that off with `set +e`."""
    if not slurm.setup:
        return []
    failed = 'echo "launch: slurm.setup failed with exit status $status: $BASH_COMMAND" >&2; exit 2'
    trap = f"status=$?; [ $status = 0 ] || {{ {failed}; }}"
    remove = "[[ $(trap -p EXIT) != *slurm.setup* ]] || trap - EXIT"  # not one that the user has set
    return [f"trap {shlex.quote(trap)} EXIT", "set -e", *slurm.setup, "set +e", remove]


def _bash_command(setup: Sequence[str], folder: Path, gpus: int) -> str:
    """The command of a local job. submitit starts it with sh; `setup` needs bash, as in a batch script."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and not has_gpu_files():
        visible = ""  # else submitit would give the job GPUs that do not exist, and training would miss them
    lines = [
        "trap '' INT",  # Ctrl-C is for the training processes; submitit's controller would kill them after a second
        *([f"export CUDA_VISIBLE_DEVICES={shlex.quote(visible)}"] if gpus and visible is not None else []),
        *setup,
        shlex.join([sys.executable, "-m", "submitit.local._local", str(folder)]),
        "exit $?",  # keeps bash as the parent process, as the controller uses its parent's pid as the job id
    ]
    return "exec bash -c " + shlex.quote("\n".join(lines))


def sbatch_script(folder: Path, slurm: SlurmConfig, cluster: str, *, name: str, tasks: int = 1) -> str:
    """The script that sbatch would get, for one job or an array of `tasks` jobs.

    Raises:
        UserError: `cluster` is not slurm.
    """
    if cluster != "slurm":
        raise UserError(f"--dry-run prints the script for sbatch; --cluster {cluster} has none")
    executor = make_executor(folder, snapshot_path(folder), slurm, cluster, name=name)
    return slurm_script(executor, "distil_tl-dry-run", tasks).rstrip()


def slurm_script(executor: Any, token: str, tasks: int) -> str:
    """The batch script of one job or an array. It has the submission's token, by which its jobs are found.

    A job finds what to call even if its submitter was killed before it could name the pickle after the job: it makes a
    link of that name, which is also the proof that it has started.
    """
    from submitit.slurm.slurm import _make_sbatch_string  # no public function returns the script without submitting it

    inner = executor._executor
    parameters = dict(inner.parameters)
    if parameters.get("comment") is None and "comment" not in (parameters.get("additional_parameters") or {}):
        parameters["comment"] = token
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    name = f'{shlex.quote(str(executor.folder))}/"{job}_submitted.pkl"'
    link = f"[ -e {name} ] || ln -s .{token}-${{SLURM_ARRAY_TASK_ID:-0}}.pkl {name} 2> /dev/null || true"
    parameters["setup"] = [link, *parameters["setup"]]
    if tasks > 1:
        parameters["map_count"] = tasks
    text: str = _make_sbatch_string(command=inner._submitit_command_str, folder=inner.folder, **parameters)
    return text


def make_private_folder(folder: Path) -> None:
    """Create a folder that only its owner can open: submitit stores pickles there, and loading a pickle runs code."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def start_job(executor: Any, task: Callable[[], int]) -> Any:
    """Start a job of this machine or this process. Returns submitit's job."""
    with without_slurm_variables():
        return executor.submit(task)


@contextmanager
def without_slurm_variables() -> Iterator[None]:
    """Hide the variables of a surrounding Slurm job, such as memory per CPU: srun would apply them to the new job."""
    hidden = {}
    if "SLURM_JOB_ID" in os.environ:
        names = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF"]
        hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def describe_resources(slurm: SlurmConfig, cluster: str) -> str:
    """The resources of a job for messages, such as `2 nodes x 8 GPUs, time limit 24:00:00`."""
    if cluster != "slurm":
        return _count(slurm.tasks, "local process", "local processes")
    kind = f"{str(slurm.gpus_per_node).partition(':')[0]} GPU" if isinstance(slurm.gpus_per_node, str) else "GPU"
    per_node = _count(slurm.gpus, kind) if slurm.gpus else _count(slurm.tasks, "CPU task")
    return f"{_count(slurm.nodes, 'node')} x {per_node}, time limit {slurm.time}"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
