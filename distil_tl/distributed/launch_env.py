"""Rank and world size, from the environment of torchrun or of a Slurm step."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from distil_tl.utils.errors import UserError
from distil_tl.utils.threads import available_cpus

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_JOB_ID",
)


@dataclass(frozen=True)
class Launch:
    """This process among those that the launcher started. `url` is torch's init method; None for a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    url: str | None = None
    launcher: str = "none"  # none | torchrun | slurm


def read_launch(env: Mapping[str, str]) -> Launch:
    """The launch that torchrun's variables describe, else those of a Slurm step, else a single process.

    A single process in a Slurm job of several tasks is probably a mistake: then there is a warning.

    Raises:
        UserError: variables are missing or inconsistent. Without this check the process would train alone, unnoticed.
    """
    if "RANK" in env or "WORLD_SIZE" in env or "LOCAL_RANK" in env:
        return _checked(_torchrun_launch(env))
    # A batch script has most SLURM_ variables too, but only a task that srun started has a step.
    if "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS") != "1":
        return _checked(_slurm_launch(env))
    tasks = env.get("SLURM_NTASKS", "")
    if "SLURM_JOB_ID" in env and tasks.isdigit() and int(tasks) > 1:  # in the shell of salloc, or a batch script
        sys.stderr.write(
            f"distil_tl: this is a single process, though the Slurm job has {tasks} tasks; to use them all, start the "
            f"command with srun\n"
        )
    return Launch()


def refuse_several_processes(command: str, env: Mapping[str, str] | None = None) -> None:
    """Raises UserError if a launcher started a command several times, each of which would do the whole work.

    Args:
        command: that the user typed, which divides no work.
        env: os.environ, if None.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher, count, way = "torchrun", env["WORLD_SIZE"], "without torchrun"
    elif "SLURM_STEP_ID" in env:
        launcher, count, way = "srun", env.get("SLURM_STEP_NUM_TASKS", ""), "without srun, or with srun --ntasks=1"
    else:
        return
    if count.isdigit() and int(count) > 1:
        raise UserError(f"{command} runs as one process, and {launcher} started {count}: start it {way}")


def _torchrun_launch(env: Mapping[str, str]) -> Launch:
    optional = tuple(name for name in ("LOCAL_WORLD_SIZE", "GROUP_RANK") if name in env)
    values = _numbers(env, (*TORCHRUN[:3], *optional), TORCHRUN, "torchrun")
    local_world_size = values.get("LOCAL_WORLD_SIZE", values["WORLD_SIZE"])
    return Launch(
        rank=values["RANK"],
        world_size=values["WORLD_SIZE"],
        local_rank=values["LOCAL_RANK"],
        local_world_size=local_world_size,
        node=values.get("GROUP_RANK", values["RANK"] // max(1, local_world_size)),
        url="env://",
        launcher="torchrun",
    )


def _slurm_launch(env: Mapping[str, str]) -> Launch:
    values = _numbers(env, SLURM[:4], SLURM, "srun")
    host = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
    port = env.get("MASTER_PORT") or _slurm_port(env["SLURM_JOB_ID"], env["SLURM_STEP_ID"])
    return Launch(
        rank=values["SLURM_PROCID"],
        world_size=values["SLURM_STEP_NUM_TASKS"],
        local_rank=values["SLURM_LOCALID"],
        local_world_size=_tasks_on_node(env["SLURM_STEP_TASKS_PER_NODE"], values["SLURM_NODEID"]),
        node=values["SLURM_NODEID"],
        url=f"tcp://{host}:{port}",
        launcher="slurm",
    )


def _numbers(
    env: Mapping[str, str], numbers: tuple[str, ...], needed: tuple[str, ...], launcher: str
) -> dict[str, int]:
    missing = [name for name in needed if name not in env]
    if missing:
        have = [name for name in needed if name in env]
        raise UserError(
            f"the environment looks like {launcher}'s ({', '.join(have)} set) but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; start with {launcher}, or unset "
            f"{', '.join(have)} to run as a single process"
        )
    try:
        return {name: int(env[name]) for name in numbers}
    except ValueError as error:
        raise UserError(f"an environment variable of {launcher} is not a number: {error}") from None


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size or not 0 <= launch.local_rank < launch.local_world_size:
        raise UserError(
            f"the {launch.launcher} environment is inconsistent: rank {launch.rank} of {launch.world_size}, "
            f"local rank {launch.local_rank} of {launch.local_world_size}"
        )
    return launch


def first_host(nodelist: str) -> str:
    """The first host name of a Slurm node list such as `gpu[007-010,12],login1` or `rack[1-2]node[3-4]`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodelist)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST {nodelist!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _slurm_port(job: str, step: str) -> int:
    # Below the ephemeral range, and different for two jobs, or two steps, on one node.
    return 12000 + (int(job) * 31 + (int(step) if step.isdigit() else 0)) % 20000


def _tasks_on_node(spec: str, node: int) -> int:
    """Number of tasks of a node, from a list such as `2(x3),1`, which means 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", spec):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


def cpus_of_rank(launch: Launch) -> int:
    """Number of CPUs for this rank and its loader processes, at least 1.

    Slurm may bind each task to its own CPUs; otherwise the ranks of a node share the CPUs that this process may use.
    """
    cpus, step = available_cpus(), os.environ.get("SLURM_CPUS_ON_NODE", "")
    bound = launch.launcher == "slurm" and step.isdigit() and cpus < int(step)
    return cpus if bound else max(1, cpus // launch.local_world_size)
