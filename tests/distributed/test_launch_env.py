"""Rank and world size from the environment, and environments that are incomplete."""

from __future__ import annotations

import pytest

from distil_tl.distributed.launch_env import Launch, first_host, read_launch, refuse_several_processes
from distil_tl.utils.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "gpu7",
    "MASTER_PORT": "29500",
}
# The variables of a batch script of a job with 8 tasks.
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def error_of(env: dict[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        read_launch(env)
    return str(caught.value)


def test_an_empty_environment_is_a_single_process():
    assert read_launch({}) == Launch()
    assert read_launch({"MASTER_ADDR": "gpu7", "PATH": "/bin"}) == Launch()
    assert Launch().url is None


def test_torchrun():
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, node=1, url="env://", launcher="torchrun")


def test_torchrun_inside_a_slurm_step():
    assert read_launch({**SRUN, **TORCHRUN}) == read_launch(TORCHRUN)


def test_a_torchrun_environment_made_by_hand_is_one_node():
    env = without({**TORCHRUN, "LOCAL_RANK": "5"}, "LOCAL_WORLD_SIZE", "GROUP_RANK")
    assert read_launch(env) == Launch(5, 8, 5, 8, node=0, url="env://", launcher="torchrun")


def test_srun():
    launch = read_launch(SRUN)
    assert launch == Launch(5, 8, 1, 4, node=1, url=launch.url, launcher="slurm")
    assert launch.url is not None
    assert launch.url.startswith("tcp://gpu007:")


def test_all_tasks_of_a_step_have_the_same_address():
    others = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert read_launch(SRUN).url == read_launch(others).url


def test_master_address_and_port_may_be_given():
    assert read_launch({**SRUN, "MASTER_ADDR": "ib7", "MASTER_PORT": "2"}).url == "tcp://ib7:2"


def test_uneven_tasks_on_nodes():
    env = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_PROCID": "7", "SLURM_NODEID": "2"}
    assert read_launch(env).local_world_size == 2
    assert read_launch({**env, "SLURM_NODEID": "1"}).local_world_size == 3


def test_a_batch_script_without_srun_is_a_single_process():
    assert read_launch(BATCH_SCRIPT) == Launch()


def test_a_single_process_in_a_job_of_several_tasks_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """As in the shell of `salloc --ntasks=2`, which is a step of its own on some clusters."""
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    for env in (job, {**job, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}):
        assert read_launch(env) == Launch()
        assert "a single process, though the Slurm job has 2 tasks; to use them all, start the command with srun" in (
            capsys.readouterr().err
        )
    read_launch({**job, "SLURM_NTASKS": "1"})
    read_launch({"SLURM_NTASKS": "2"})
    read_launch({**SRUN, **job})
    assert capsys.readouterr().err == ""


def test_a_command_that_divides_no_work_is_refused_in_several_processes() -> None:
    for env in ({}, {**TORCHRUN, "WORLD_SIZE": "1"}, BATCH_SCRIPT, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}):
        refuse_several_processes("distil-tl x", env)
    with pytest.raises(UserError, match="^distil-tl x runs as one process, and torchrun started 8: start it without"):
        refuse_several_processes("distil-tl x", {**SRUN, **TORCHRUN})
    with pytest.raises(UserError, match="srun started 8: start it without srun, or with srun --ntasks=1$"):
        refuse_several_processes("distil-tl x", SRUN)


def test_a_step_of_one_task_is_a_single_process():
    assert read_launch({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Launch()


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_torchrun_environment(missing: str):
    message = error_of(without(TORCHRUN, missing))
    assert f"but {missing} is missing" in message
    assert "looks like torchrun's" in message


def test_all_missing_variables_are_listed():
    message = error_of({"RANK": "0"})
    assert "(RANK set) but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing" in message
    assert "unset RANK" in message


@pytest.mark.parametrize(
    "missing",
    [
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_NODELIST",
        "SLURM_JOB_ID",
    ],
)
def test_an_incomplete_slurm_step(missing: str):
    message = error_of(without(SRUN, missing))
    assert f"but {missing} is missing" in message
    assert "looks like srun's" in message


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({**TORCHRUN, "RANK": "-1"}, "rank -1 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**SRUN, "SLURM_PROCID": "9"}, "rank 9 of 8"),
        ({**SRUN, "SLURM_LOCALID": "4"}, "local rank 4 of 4"),
    ],
)
def test_inconsistent_numbers(env: dict[str, str], part: str):
    message = error_of(env)
    assert "is inconsistent" in message
    assert part in message


@pytest.mark.parametrize("env", [{**TORCHRUN, "RANK": "zero"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "many"}])
def test_values_that_are_not_numbers(env: dict[str, str]):
    assert "is not a number" in error_of(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-010,12]", "gpu007"),
        ("gpu[007-010,12],login1", "gpu007"),
        ("gpu[12,007-010]", "gpu12"),
        ("a-b[3]", "a-b3"),
        ("a-b-7.cluster.example,c[1-2]", "a-b-7.cluster.example"),
        ("rack[1-4]-ib", "rack1-ib"),
        ("rack[1-4]-ib,other", "rack1-ib"),
        ("rack[1-2]node[03-04],x", "rack1node03"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "GROUP_RANK", "RANK"])
def test_each_variable_must_be_a_number(name: str):
    with pytest.raises(UserError, match="is not a number"):
        read_launch({**TORCHRUN, name: "eight"})


def test_a_node_list_without_a_host():
    with pytest.raises(UserError, match="names no host"):
        first_host("")


def test_neighbouring_jobs_and_steps_have_different_ports():
    urls = {
        read_launch({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).url
        for job in range(4700, 4720)
        for step in range(20)
    }
    assert len(urls) == 20 * 20
    assert all(1024 < int(str(url).rpartition(":")[2]) < 32768 for url in urls)  # where Linux's ephemeral range begins
