"""A real Slurm for tests: the cluster that slurm/dev-cluster brings up, and the commands that tests run on it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "slurm/dev-cluster"
REQUIRED = os.environ.get("DISTIL_TL_REQUIRE_SLURM") == "1"


def dev_cluster(*arguments: object, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Nodes n1, n2, ... with 4 CPUs and 4 claimed GPUs each, and partitions batch, grace and urgent on all of them."""

    dir: Path
    environment: dict[str, str]  # for the processes that use the cluster

    def tool(self, command: str, *arguments: str) -> str:
        """The standard output of a command of slurm/dev-cluster."""
        done = dev_cluster(command, "--dir", self.dir, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *command: object, timeout: float = 120) -> str:
        """The standard output of a command on this machine, such as squeue."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    @property
    def options(self) -> list[str]:
        """Options of sbatch and srun that all jobs get, unless the test gives others."""
        return []

    def srun(self, *command: object) -> str:
        return self.run("srun", *self.options, *command)

    def sbatch(self, script: str, *options: object, output: Path | None = None) -> str:
        """Submit a batch job that runs the lines of `script`. Its id."""
        appended = [f"--output={output or '/dev/null'}", "--open-mode=append"]  # also after a requeue
        command = ["sbatch", "--parsable", *appended, *self.options, *options, f"--wrap={script}"]
        return self.run(*command).strip()

    def state(self, job: str) -> str:
        """The job's state in squeue, such as PENDING, RUNNING or COMPLETED."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_for(self, job: str, *states: str, timeout: float = 300) -> str:
        """Wait until the job is in one of the states. That state."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                details = self.run("scontrol", "show", "job", job) + self.run("sinfo", "-N")
                raise AssertionError(f"job {job} is {state}, not {' or '.join(states)}, after {timeout} s\n{details}")
            time.sleep(0.2)
        return state

    def history(self, job: str) -> list[str]:
        """The final state of each of the job's runs, from accounting; of one that still runs its current state."""
        lines = self.run("sacct", "-DXnP", f"--jobs={job}", "--format=State").splitlines()
        return [line.split()[0] for line in lines]  # only the first word of "CANCELLED by 0"

    def scancel(self, *jobs: str) -> None:
        self.run("scancel", *jobs)

    def address(self, machine: str) -> str:
        """The address of the head, of a node, or of this machine (by its host name), on the cluster's network."""
        lines = (self.dir / "etc/hosts").read_text().splitlines()
        return {name: address for address, name in map(str.split, lines)}[machine]

    def cut(self, node: str) -> None:
        """Take its link down. Its processes keep running; Slurm notices after about 30 s."""
        self.tool("cut", node)

    def heal(self, node: str) -> None:
        """Bring its link up again. Its processes keep running until Slurm contacts the node, about a minute later."""
        self.tool("heal", node)


@dataclass(frozen=True)
class Partition(Cluster):
    """Two nodes of a cluster and a Slurm partition of them, for one test at a time."""

    name: str
    nodes: tuple[str, str]

    @property
    def options(self) -> list[str]:
        return [f"--partition={self.name}"]

    def create(self) -> None:
        self.run("scontrol", "create", f"partitionname={self.name}", f"nodes={','.join(self.nodes)}", "defaulttime=60")

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", f"--partition={self.name}", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)

    @contextlib.contextmanager
    def only_on(self, node: str) -> Iterator[None]:
        """Jobs that start meanwhile start on this node. Requeued later, they may start on the other one."""
        (other,) = set(self.nodes) - {node}
        self.run("scontrol", "update", f"nodename={other}", "state=drain", "reason=test")
        try:
            yield
        finally:
            self.run("scontrol", "update", f"nodename={other}", "state=resume")

    def restore(self) -> None:
        """Cancel all jobs, bring the nodes back, and wait until they are idle."""
        self.run("scancel", f"--partition={self.name}")
        self.run("scancel", f"--nodelist={','.join(self.nodes)}")
        states = self.node_states()
        status = {line.split()[0]: line for line in dev_cluster("status", "--dir", self.dir).stdout.splitlines()[1:]}
        for node in self.nodes:
            if "cut off" in status[node]:
                self.heal(node)
            if not status[node].endswith("ok") or states[node] not in ("idle", "mix", "alloc", "comp"):
                self.tool("kill-slurmd", node)
                self.tool("start-slurmd", node)  # it registers with slurmctld at once
        deadline = time.monotonic() + 180
        while set((states := self.node_states()).values()) != {"idle"}:
            assert time.monotonic() < deadline, f"not idle after 180 s: {states}"
            time.sleep(0.2)


@contextlib.contextmanager
def brought_up(*options: object) -> Iterator[Cluster]:
    """A new cluster, taken down at the end. If this machine allows none, skips, or fails if REQUIRED."""
    # Not in pytest's tmp_path, because its names are too long for Unix sockets.
    with tempfile.TemporaryDirectory(prefix="dtl-", dir="/tmp") as parent:
        directory = Path(parent) / "slurm"
        try:
            done = dev_cluster("up", "--dir", directory, *options)
            if done.returncode == 2 and not REQUIRED:
                pytest.skip(f"no Slurm: {done.stderr.strip()}")
            assert done.returncode == 0, done.stderr
            exports = dev_cluster("env", "--dir", directory).stdout.splitlines()
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
            for line in exports:
                name, _, value = shlex.split(line)[1].partition("=")
                environment[name] = value
            yield Cluster(directory, {**environment, "OMP_NUM_THREADS": "1"})
        finally:
            with ctrl_c_ignored():  # the directory is removed next, and nothing else could find the cluster
                dev_cluster("down", "--dir", directory)


@contextlib.contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def partitions(cluster: Cluster, names: Sequence[str]) -> list[Partition]:
    """Partitions of two nodes each: of n1 and n2, of n3 and n4, ..."""
    found = [
        Partition(cluster.dir, cluster.environment, name, (f"n{2 * i + 1}", f"n{2 * i + 2}"))
        for i, name in enumerate(names)
    ]
    for partition in found:
        partition.create()
    return found
