"""What a job may ask of Slurm, and what submitit makes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.slurm_config import EARLY_S, KEY_OF, SlurmConfig, parse_minutes


def problems(**values: Any) -> list[str]:
    return list(SlurmConfig(**values).problems())


def only_problem(**values: Any) -> str:
    (found,) = problems(**values)
    return found


# Times


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("0090", 90),
        ("90:00", 90),
        ("90:01", 91),
        ("1:30:00", 90),
        ("24:00:00", 24 * 60),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("1-12:30:00", 36 * 60 + 30),
        ("1-12:30:01", 36 * 60 + 31),
        ("0-0:0:1", 1),
        ("0:120", 2),
        (" 90 ", 90),
    ],
)
def test_slurms_ways_to_write_a_time(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1h", "-5", "1:2:3:4", "1-", "1-2-3", "1.5", ":30", "30:", "UNLIMITED"])
def test_what_is_no_time(text: str) -> None:
    assert parse_minutes(text) is None
    assert only_problem(time=text) == f"slurm.time={text} is not a time limit; use minutes, HH:MM:SS or D-HH:MM:SS"


@given(st.data())
def test_every_notation_gives_the_sum_of_its_parts(data: st.DataObject) -> None:
    """The units are those of the parts in the notation."""
    worth = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    notation = data.draw(
        st.sampled_from(
            [
                "{minutes}",
                "{minutes}:{seconds}",
                "{hours}:{minutes}:{seconds}",
                "{days}-{hours}",
                "{days}-{hours}:{minutes}",
                "{days}-{hours}:{minutes}:{seconds}",
            ]
        )
    )
    parts = {unit: data.draw(st.integers(0, 400), unit) for unit in worth if f"{{{unit}}}" in notation}
    total = sum(worth[unit] * count for unit, count in parts.items())
    found = parse_minutes(notation.format(**parts))
    assert found is not None
    assert 60 * (found - 1) < total <= 60 * found


# Invalid values


def test_the_defaults_are_all_right() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": 0}, "slurm.nodes must be at least 1"),
        ({"gpus_per_node": -1}, "slurm.gpus_per_node must be at least 0"),
        ({"cpus_per_task": 0}, "slurm.cpus_per_task must be at least 1"),
        ({"array_parallelism": 0}, "slurm.array_parallelism must be at least 1"),
        ({"tasks_per_node": 0}, "slurm.tasks_per_node must be at least 1, or null for one per GPU"),
        (
            {"tasks_per_node": 4, "gpus_per_node": 2},
            "slurm.tasks_per_node=4 with slurm.gpus_per_node=2: each task needs its own GPU; leave out "
            "tasks_per_node, or use the same number for both",
        ),
        (
            {"tasks_per_node": 2, "gpus_per_node": 8},
            "slurm.tasks_per_node=2 with slurm.gpus_per_node=8: a task uses only one GPU; leave out tasks_per_node, "
            "or use the same number for both",
        ),
        ({"signal_delay_s": 0}, "slurm.signal_delay_s must be at least 1"),
        ({"time": "0"}, "slurm.time=0 is not a time limit; use minutes, HH:MM:SS or D-HH:MM:SS"),
        (
            {"time": "3"},
            "slurm.signal_delay_s=120: Slurm may send the signal 60 s earlier still, so with slurm.time=3 the job "
            "could be stopped as soon as it starts; use a shorter delay or a longer time limit",
        ),
        (
            {"mem": "lots"},
            "slurm.mem=lots is not an amount of memory; use for example 64GB, or 0 for all of a node",
        ),
        ({"extra": {"ntasks_per_node": 8}}, "slurm.extra.ntasks_per_node: use slurm.tasks_per_node"),
        ({"extra": {"time": 5}}, "slurm.extra.time: use slurm.time"),
        ({"extra": {"gpus-per-task": 1}}, "slurm.extra.gpus-per-task: use slurm.gpus_per_node"),
        ({"extra": {"job-name": "x"}}, "slurm.extra.job-name: use slurm.job_name"),
        ({"extra": {"output": "x"}}, "slurm.extra.output: launch needs its own value; remove it"),
        (
            {"gpus_per_node": "a100"},
            "slurm.gpus_per_node=a100 is not a number of GPUs; use for example 4, or a100:4 with a type",
        ),
        ({"gpus_per_node": "a100:0"}, "slurm.gpus_per_node must be at least 1"),
        (
            {"gpus_per_node": "a100:4", "tasks_per_node": 2},
            "slurm.tasks_per_node=2 with slurm.gpus_per_node=a100:4: a task uses only one GPU; leave out "
            "tasks_per_node, or use the same number for both",
        ),
        ({"srun_args": ["--ntasks=3"]}, "slurm.srun_args: --ntasks=3: use slurm.tasks_per_node"),
        ({"srun_args": ["--mpi", "pmix", "-n4"]}, "slurm.srun_args: -n4: use slurm.tasks_per_node"),
        ({"srun_args": ["--output=x"]}, "slurm.srun_args: --output=x: launch needs its own value; remove it"),
        (
            {"mail_user": "me@lab"},
            "slurm.mail_user without slurm.mail_type sends no mail; add for example slurm.mail_type=END,FAIL",
        ),
    ],
)
def test_each_mistake_is_named_with_its_key(values: dict[str, Any], message: str) -> None:
    assert only_problem(**values) == message


def test_all_mistakes_are_listed() -> None:
    found = problems(nodes=0, cpus_per_task=0, time="soon", mem="1", extra={"signal": "USR1@10"})
    assert len(found) == 5


def test_the_warning_leaves_time_to_train() -> None:
    """Slurm gives it up to a minute early: a job as long as the warning and that minute would never do anything."""
    for minutes in (2, 3, 10, 60):
        limit = 60 * minutes - EARLY_S
        assert problems(time=str(minutes), signal_delay_s=limit - 1) == []
        assert len(problems(time=str(minutes), signal_delay_s=limit)) == 1
        assert len(problems(time=str(minutes), signal_delay_s=2 * limit + 60)) == 1


@pytest.mark.parametrize("mem", ["64GB", "64G", "64gb", "500M", "500MB", "1T", "65536K", "0"])
def test_amounts_of_memory_that_sbatch_takes(mem: str) -> None:
    assert problems(mem=mem) == []


@pytest.mark.parametrize("mem", ["64 GB", "1.5T", "64", "GB", "-1G", "64GBs", ""])
def test_amounts_of_memory_that_sbatch_refuses_or_takes_for_something_else(mem: str) -> None:
    assert len(problems(mem=mem)) == 1


@pytest.mark.parametrize(("gpus", "given", "tasks"), [(8, None, 8), (8, 8, 8), (1, None, 1), (0, None, 1), (0, 4, 4)])
def test_one_task_per_gpu_or_the_given_number(gpus: int, given: int | None, tasks: int) -> None:
    config = SlurmConfig(nodes=3, gpus_per_node=gpus, tasks_per_node=given)
    assert list(config.problems()) == []
    assert (config.tasks, config.world_size) == (tasks, 3 * tasks)


# For submitit


def test_parameters_name_everything_that_was_set() -> None:
    config = SlurmConfig(
        partition="gpu", account="lab", qos="high", nodes=2, gpus_per_node=4, cpus_per_task=6, mem="64GB",
        time="1:30:00", constraint="a100", exclude="n[3-4]", array_parallelism=5, signal_delay_s=99,
        extra={"reservation": "course"},
    )  # fmt: skip
    assert config.parameters("flowers") == {
        "name": "flowers",
        "timeout_min": 90,
        "nodes": 2,
        "tasks_per_node": 4,
        "cpus_per_task": 6,
        "gpus_per_node": 4,
        "stderr_to_stdout": True,
        "slurm_partition": "gpu",
        "slurm_account": "lab",
        "slurm_qos": "high",
        "slurm_mem": "64GB",
        "slurm_constraint": "a100",
        "slurm_exclude": "n[3-4]",
        "slurm_array_parallelism": 5,
        "slurm_signal_delay_s": 99,
        "slurm_additional_parameters": {"requeue": True, "reservation": "course"},
    }


def test_parameters_of_the_job_and_its_mail() -> None:
    given: dict[str, Any] = {
        "comment": "grant 5",
        "dependency": "afterok:7",
        "mail_user": "me@lab",
        "mail_type": "END,time_limit",
    }
    config = SlurmConfig(job_name="nightly", srun_args=["--cpu-bind=cores"], **given)
    assert list(config.problems()) == []
    found = config.parameters("flowers")
    assert {key: found[f"slurm_{key}"] for key in given} == given
    assert (found["name"], found["slurm_srun_args"]) == ("nightly", ["--cpu-bind=cores"])


@pytest.mark.parametrize("given", ["a100:4", "nvidia_a100-sxm4-80gb:4", "1g.5gb:4"])
def test_gpus_of_a_type(given: str) -> None:
    config = SlurmConfig(nodes=2, gpus_per_node=given)
    assert list(config.problems()) == []
    assert (config.gpus, config.tasks, config.world_size) == (4, 4, 8)
    found = config.parameters("flowers")
    assert (found["gpus_per_node"], found["slurm_gpus_per_node"]) == (4, given), "submitit takes a type for Slurm only"


@pytest.mark.parametrize("args", [["apptainer", "exec", "-n", "x.sif"], ["--mpi=pmix", "apptainer", "--output=x"]])
def test_options_of_a_command_that_srun_starts_are_not_those_of_srun(args: list[str]) -> None:
    assert problems(srun_args=args) == []


def test_parameters_leave_the_clusters_defaults_alone() -> None:
    found = SlurmConfig(gpus_per_node=0).parameters("x")
    assert not {"gpus_per_node", "slurm_partition", "slurm_account", "slurm_mem"} & found.keys()


def test_an_option_that_is_switched_off_is_not_given() -> None:
    """sbatch has no --requeue=False; an option is off if it is left out."""
    extra = {"requeue": False, "exclusive": True, "comment": None, "nice": 0}
    found = SlurmConfig(extra=extra).parameters("x")["slurm_additional_parameters"]
    assert found == {"exclusive": True, "nice": 0}


def test_every_option_with_a_key_of_its_own_is_that_of_a_field() -> None:
    assert set(KEY_OF.values()) <= {field.name for field in dataclasses.fields(SlurmConfig)}
