"""slurm/dev-cluster: a real Slurm that comes, behaves as one, and goes without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import SCRIPT, Cluster, brought_up, dev_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


def wait_until(true: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster of the whole session, and as new for the next test."""
    yield slurm_cluster
    slurm_cluster.restore()


# Coming and going.


def processes(directory: Path) -> dict[int, str]:
    """Those that have it in their command line, which they have if they hold a machine, and their command lines."""
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


def test_a_cluster_goes_without_a_trace_even_with_jobs_on_it(slurm_cluster: Cluster) -> None:
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
    assert slurm_cluster.tool("status").count("ok\n") == 3


@pytest.mark.parametrize("until", ["etc/machine", "db/ibdata1", "run/slurmdbd.pid"])
def test_what_a_killed_up_has_half_made_goes_the_same_way(slurm_cluster: Cluster, until: str) -> None:
    directory = slurm_cluster.dir.with_name("half")
    process = subprocess.Popen([sys.executable, SCRIPT, "up", "--dir", directory], stderr=subprocess.DEVNULL)
    wait_until((directory / until).exists)
    process.kill()
    process.wait()
    assert left_by(directory)
    assert dev_cluster("status", "--dir", directory).returncode == 1
    assert dev_cluster("down", "--dir", directory).returncode == 0
    assert left_by(directory) == []


def test_ctrl_c_takes_down_what_was_half_made(slurm_cluster: Cluster) -> None:
    directory = slurm_cluster.dir.with_name("interrupted")
    process = subprocess.Popen([sys.executable, SCRIPT, "up", "--dir", directory], stderr=subprocess.DEVNULL)
    wait_until((directory / "db/ibdata1").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert left_by(directory) == []


def test_a_daemon_that_fails_is_quoted_and_nothing_remains(slurm_cluster: Cluster, tmp_path: Path) -> None:
    directory = slurm_cluster.dir.with_name("failing")
    (tmp_path / "slurmdbd").write_text("#!/bin/sh\necho no rows today\nexit 1\n")
    (tmp_path / "slurmdbd").chmod(0o755)
    failed = dev_cluster("up", "--dir", directory, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert failed.returncode == 1
    assert "slurmdbd died" in failed.stderr
    assert "no rows today" in failed.stderr
    assert left_by(directory) == []


def test_run_gives_a_command_a_cluster_and_hands_on_its_status(slurm_cluster: Cluster) -> None:
    directory = slurm_cluster.dir.with_name("run")
    done = dev_cluster("run", "--dir", directory, "--nodes", 1, "--", "sh", "-c", "srun hostname && exit 7")
    assert (done.returncode, done.stdout) == (7, "n1\n")
    assert left_by(directory) == []


# What cannot be.


def as_user(number: int, *arguments: object, path: str) -> str:
    """What the script says when it refuses to serve this user, with only these commands besides those in sbin."""
    stub = f"import os, runpy, sys; os.geteuid = lambda: {number}; sys.argv.pop(0); runpy.run_path(sys.argv[0], None,"
    done = subprocess.run(
        [sys.executable, "-c", f"{stub} '__main__')", SCRIPT, *map(str, arguments)],
        env={"PATH": path}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_refusals_name_the_way_out(tmp_path: Path) -> None:
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


def test_other_directories_are_left_alone(slurm_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    for command in ("up", "down"):
        assert dev_cluster(command, "--dir", tmp_path).returncode == 2
    assert (tmp_path / "precious").exists()
    assert "exists already" in dev_cluster("up", "--dir", slurm_cluster.dir).stderr
    assert "no cluster in" in dev_cluster("env", "--dir", tmp_path).stderr
    assert "no node 'n3': n1, n2" in dev_cluster("cut", "--dir", slurm_cluster.dir, "n3").stderr


# What a cluster does.


def test_tasks_run_on_hosts_of_their_own_which_know_each_other(cluster: Cluster) -> None:
    names = ("n1", "n2", "head", socket.gethostname())
    script = f"echo $(hostname) $SLURM_NODEID $SLURM_LOCALID $(getent hosts {' '.join(names)} | cut -d' ' -f1)"
    seen = sorted(cluster.run("srun", "-N2", "--ntasks-per-node=2", "sh", "-c", script).splitlines())
    addresses = " ".join(cluster.address(name) for name in names)
    assert seen == [f"n{node + 1} {node} {local} {addresses}" for node in (0, 1) for local in (0, 1)]


def test_gpus_are_there_in_name(cluster: Cluster) -> None:
    request = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--mem=32G", "--time=5")
    assert cluster.run("srun", *request, "sh", "-c", "echo $CUDA_VISIBLE_DEVICES").split() == ["0,1"] * 4
    assert cluster.run("srun", "--gres=gpu:4", "sh", "-c", "echo $SLURM_GPUS_ON_NODE").split() == ["4"]
    with pytest.raises(AssertionError, match="not available"):
        cluster.run("srun", "--gpus-per-node=5", "true")


REDUCE = """
import os, torch, torch.distributed as dist
rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
dist.init_process_group("gloo", init_method="tcp://n1:29400", rank=rank, world_size=world)
found = torch.tensor([rank + 1])
dist.all_reduce(found)
dist.destroy_process_group()
print(os.uname().nodename, found.item())
"""


def test_ranks_on_two_nodes_reduce_over_gloo(cluster: Cluster) -> None:
    seen = cluster.run("srun", "-N2", "--ntasks-per-node=2", sys.executable, "-c", REDUCE, timeout=120)
    assert sorted(seen.splitlines()) == ["n1 10", "n1 10", "n2 10", "n2 10"]


def test_what_tasks_orphan_ends_with_them(cluster: Cluster) -> None:
    began = time.monotonic()
    orphan = "(setsid sleep 987654 &); sleep 0.5; exit 3"
    job = cluster.sbatch(f"srun sh -c '{orphan}'; {orphan}")
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert time.monotonic() < began + 50  # a step that waits for the orphan's output does so for a minute
    assert cluster.run("srun", "-N2", "sh", "-c", "! grep -az '^987654' /proc/[0-9]*/cmdline") == ""


def test_an_urgent_job_preempts_and_the_other_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job = cluster.sbatch("srun sh -c 'echo $SLURM_RESTART_COUNT; sleep 1000'", "-N2", "-n2", output=output)
    wait_until(lambda: output.exists() and output.read_text().count("\n") >= 2)
    urgent = cluster.sbatch("sleep 1", "--partition=urgent", "-N2", "-n8")
    cluster.wait_for(urgent, "COMPLETED")
    wait_until(lambda: output.read_text().count("1\n") == 2)
    assert cluster.state(job) == "RUNNING"
    assert cluster.history(job) == ["PREEMPTED", "RUNNING"]
    cluster.scancel(job)
    cluster.wait_for(job, "CANCELLED")
    assert cluster.history(job) == ["PREEMPTED", "CANCELLED"]


def test_a_node_that_is_cut_off_fails_its_job_and_goes_on_by_itself(cluster: Cluster, tmp_path: Path) -> None:
    beats = "while sleep 0.2; do date >>$0-$(hostname); done"
    job = cluster.sbatch(f"srun sh -c '{beats}' {tmp_path}/beats", "-N2", "-n2")
    ghost = tmp_path / "beats-n2"
    wait_until(ghost.exists)
    cluster.cut("n2")
    assert dev_cluster("status", "--dir", cluster.dir).returncode == 1
    cluster.wait_for(job, "PENDING", timeout=90)
    assert cluster.history(job)[0] == "NODE_FAIL"
    assert cluster.node_states()["n2"].startswith("down")
    size = ghost.stat().st_size
    wait_until(lambda: ghost.stat().st_size > size)  # what has to be fenced
    cluster.restore()
    assert cluster.history(job) == ["NODE_FAIL", "CANCELLED"]
