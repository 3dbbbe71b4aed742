"""slurm/dev-cluster: a real Slurm, brought up and taken down without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.concurrent_tests import concurrent
from tests.helpers.slurm_cluster import SCRIPT, Cluster, Partition, brought_up, dev_cluster
from tests.helpers.slurm_jobs import Inputs, wait_until

# The fixture starts the concurrent tests, which then run beside the others here.
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("slurm"),
    pytest.mark.usefixtures("concurrent_tests"),
]


# Bringing up and taking down.


def processes(directory: Path) -> dict[int, str]:
    """The processes with the directory in their command line, as the holders of machines have it."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # has ended
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(directory) in command and int(entry.parts[2]) != os.getpid():
                found[int(entry.parts[2])] = command
    return found


def namespaces(pid: int | str) -> set[str]:
    found = set()
    for link in Path("/proc").glob(f"{pid}/ns/*"):
        with contextlib.suppress(OSError):  # has ended
            found.add(str(link.readlink()))
    return found


def links() -> dict[str, list[str]]:
    shown = subprocess.run(["ip", "-json", "address"], capture_output=True, check=True).stdout
    return {link["ifname"]: [info["local"] for info in link["addr_info"]] for link in json.loads(shown)}


def left_by(directory: Path) -> list[str]:
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]
    return [*processes(directory).values(), *mounts, *([str(directory)] if directory.exists() else [])]


def test_down_leaves_no_trace_even_with_jobs_running(slurm_cluster: Cluster) -> None:
    in_run = set(Path("/run").iterdir())
    with brought_up("--nodes", 1, "--cpus", 2, "--name", "other") as other:
        assert other.address("n1") != slurm_cluster.address("n1")
        job = other.sbatch("(setsid sleep 1000 &); srun sh -c 'trap : TERM; sleep 1000; sleep 1000'")
        other.wait_for(job, "RUNNING")
        mine = [name for name, addresses in links().items() if other.address(socket.gethostname()) in addresses]
        added = set().union(*map(namespaces, processes(other.dir))) - namespaces("self")
        assert len(mine) == 1
        assert len(added) == 2 * 4  # network, mounts, host name and processes of head and n1
        assert "n1    " in other.tool("status")
        assert dev_cluster("down", "--dir", other.dir).returncode == 0
        assert left_by(other.dir) == []
        assert not set(mine) & set(links())
        assert not added & namespaces("[0-9]*")
        assert set(Path("/run").iterdir()) == in_run
        again = dev_cluster("down", "--dir", other.dir)
        assert (again.returncode, again.stderr) == (0, f"there is no cluster in {other.dir}\n")
    head = dev_cluster("status", "--dir", slurm_cluster.dir).stdout.splitlines()[1]
    assert head.startswith("head ")
    assert head.endswith(" ok"), "the other cluster was not touched"


@pytest.mark.parametrize("until", ["etc/machine", "db/ibdata1", "run/slurmdbd.pid"])
def test_down_removes_what_a_killed_up_left(slurm_cluster: Cluster, until: str) -> None:
    directory = slurm_cluster.dir.with_name("half")
    process = subprocess.Popen([sys.executable, SCRIPT, "up", "--dir", directory], stderr=subprocess.DEVNULL)
    wait_until((directory / until).exists)
    process.kill()
    process.wait()
    assert left_by(directory)
    assert dev_cluster("status", "--dir", directory).returncode == 1
    assert dev_cluster("down", "--dir", directory).returncode == 0
    assert left_by(directory) == []


def test_ctrl_c_takes_a_half_made_cluster_down(slurm_cluster: Cluster) -> None:
    directory = slurm_cluster.dir.with_name("interrupted")
    process = subprocess.Popen([sys.executable, SCRIPT, "up", "--dir", directory], stderr=subprocess.DEVNULL)
    wait_until((directory / "db/ibdata1").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert left_by(directory) == []


def test_the_log_of_a_failed_daemon_is_quoted_and_nothing_remains(slurm_cluster: Cluster, tmp_path: Path) -> None:
    directory = slurm_cluster.dir.with_name("failing")
    (tmp_path / "slurmdbd").write_text("#!/bin/sh\necho no rows today\nexit 1\n")
    (tmp_path / "slurmdbd").chmod(0o755)
    failed = dev_cluster("up", "--dir", directory, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert failed.returncode == 1
    assert "slurmdbd died" in failed.stderr
    assert "no rows today" in failed.stderr
    assert left_by(directory) == []


def test_run_returns_the_exit_status_of_its_command(slurm_cluster: Cluster) -> None:
    directory = slurm_cluster.dir.with_name("run")
    done = dev_cluster("run", "--dir", directory, "--nodes", 1, "--", "sh", "-c", "srun hostname && exit 7")
    assert (done.returncode, done.stdout) == (7, "n1\n")
    assert left_by(directory) == []


# Refusals.


def as_user(number: int, *arguments: object, path: str) -> str:
    """The message with which the script refuses this user. `path` is PATH; the script adds sbin to it."""
    stub = f"import os, runpy, sys; os.geteuid = lambda: {number}; sys.argv.pop(0); runpy.run_path(sys.argv[0], None,"
    done = subprocess.run(
        [sys.executable, "-c", f"{stub} '__main__')", SCRIPT, *map(str, arguments)],
        env={"PATH": path}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_refusals_name_the_remedy(tmp_path: Path) -> None:
    up = ("up", "--dir", tmp_path / "slurm")
    assert as_user(1000, *up, path=os.environ["PATH"]).count("run this as root\n") == 1
    missing = as_user(0, *up, path=str(tmp_path)).splitlines()
    assert len(missing) == 2
    assert "slurm-wlm" in missing[0]
    assert missing[1].startswith("    apt-get install --no-install-recommends")
    assert "slurm-wlm" in missing[1]
    assert not (tmp_path / "slurm").exists()


def test_a_container_without_namespaces_is_refused(slurm_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "unshare").write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    directory = slurm_cluster.dir.with_name("denied")
    refused = as_user(0, "up", "--dir", directory, path=f"{tmp_path}:{os.environ['PATH']}")
    assert "does not allow namespaces" in refused
    assert "Operation not permitted" in refused
    assert not directory.exists()


def test_other_directories_are_not_changed(slurm_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    for command in ("up", "down"):
        assert dev_cluster(command, "--dir", tmp_path).returncode == 2
    assert (tmp_path / "precious").exists()
    assert "exists already" in dev_cluster("up", "--dir", slurm_cluster.dir).stderr
    assert "no cluster in" in dev_cluster("env", "--dir", tmp_path).stderr
    assert "no node 'n99': n1, n2" in dev_cluster("cut", "--dir", slurm_cluster.dir, "n99").stderr


# What a cluster does.


@concurrent()
def test_tasks_run_on_hosts_that_know_each_other_by_name(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    names = (*partition.nodes, "head", socket.gethostname())
    script = f"echo $(hostname) $SLURM_NODEID $SLURM_LOCALID $(getent hosts {' '.join(names)} | cut -d' ' -f1)"
    seen = partition.srun("-N2", "--ntasks-per-node=2", "sh", "-c", script).splitlines()
    addresses = " ".join(partition.address(name) for name in names)
    expected = [f"{partition.nodes[node]} {node} {local} {addresses}" for node in (0, 1) for local in (0, 1)]
    assert sorted(seen) == sorted(expected)


@concurrent()
def test_claimed_gpus_are_granted(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    request = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--mem=32G", "--time=5")
    assert partition.srun(*request, "sh", "-c", "echo $CUDA_VISIBLE_DEVICES").split() == ["0,1"] * 4
    assert partition.srun("--gres=gpu:4", "sh", "-c", "echo $SLURM_GPUS_ON_NODE").split() == ["4"]
    with pytest.raises(AssertionError, match="not available"):
        partition.srun("--gpus-per-node=5", "true")


REDUCE = """
import atexit, gc, os, torch, torch.distributed as dist
atexit.register(gc.freeze)  # a quick exit
rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
dist.init_process_group("gloo", init_method="tcp://FIRST:29400", rank=rank, world_size=world)
found = torch.tensor([rank + 1])
dist.all_reduce(found)
dist.destroy_process_group()
print(os.uname().nodename, found.item())
"""


@concurrent()
def test_ranks_on_two_nodes_reduce_over_gloo(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    script = REDUCE.replace("FIRST", partition.nodes[0])
    seen = partition.srun("-N2", "--ntasks-per-node=2", sys.executable, "-c", script)
    assert sorted(seen.splitlines()) == sorted(2 * [f"{node} 10" for node in partition.nodes])


@concurrent()
def test_the_orphaned_processes_of_a_task_end_with_it(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    began = time.monotonic()
    orphan = "(setsid sleep 987654 &); sleep 0.5; exit 3"
    job = partition.sbatch(f"srun sh -c '{orphan}'; {orphan}")
    assert partition.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert time.monotonic() < began + 50  # a step would wait a minute for the orphan's output
    assert partition.srun("-N2", "sh", "-c", "! grep -az '^987654' /proc/[0-9]*/cmdline") == ""


@concurrent()
def test_an_urgent_job_preempts_another_which_is_requeued(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job = partition.sbatch("srun sh -c 'echo $SLURM_RESTART_COUNT; sleep 1000'", "-N2", "-n2", output=output)
    wait_until(lambda: output.exists() and output.read_text().count("\n") >= 2)
    urgent = partition.sbatch("sleep 1", "--partition=urgent", "-N2", "-n8", f"--nodelist={','.join(partition.nodes)}")
    partition.wait_for(urgent, "COMPLETED")
    wait_until(lambda: output.read_text().count("1\n") == 2)
    assert partition.state(job) == "RUNNING"
    assert partition.history(job) == ["PREEMPTED", "RUNNING"]
    partition.scancel(job)
    partition.wait_for(job, "CANCELLED")
    assert partition.history(job) == ["PREEMPTED", "CANCELLED"]


@concurrent(first=True)
def test_a_job_on_a_cut_node_fails_and_its_processes_keep_running(
    partition: Partition, inputs: Inputs, tmp_path: Path
) -> None:
    beats = "while sleep 0.2; do date >>$0-$(hostname); done"
    job = partition.sbatch(f"srun sh -c '{beats}' {tmp_path}/beats", "-N2", "-n2")
    node = partition.nodes[1]
    on_cut_node = tmp_path / f"beats-{node}"
    wait_until(on_cut_node.exists)
    partition.cut(node)
    assert dev_cluster("status", "--dir", partition.dir).returncode == 1
    partition.wait_for(job, "PENDING")
    assert partition.history(job)[0] == "NODE_FAIL"
    assert partition.node_states()[node].startswith("down")
    size = on_cut_node.stat().st_size
    wait_until(lambda: on_cut_node.stat().st_size > size)  # such processes must not write to a run
    partition.restore()
    assert partition.history(job) == ["NODE_FAIL", "CANCELLED"]
