"""A real Slurm for tests: what slurm/dev-cluster brings up, and the commands that tests give it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "slurm/dev-cluster"
REQUIRED = os.environ.get("DISTIL_TL_REQUIRE_SLURM") == "1"


def dev_cluster(*arguments: object, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Nodes n1 and n2, of 4 CPUs and 4 GPUs in name each, and partitions batch, grace and urgent."""

    dir: Path
    environment: dict[str, str]  # for whatever is to submit to it

    def tool(self, command: str, *arguments: str) -> str:
        done = dev_cluster(command, "--dir", self.dir, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *command: object, timeout: float = 60) -> str:
        """The standard output of a command of this machine, such as srun."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: object, output: Path | None = None) -> str:
        """The id of a batch job that runs the lines of `script`."""
        appended = [f"--output={output or '/dev/null'}", "--open-mode=append"]  # a requeued job goes on in its file
        return self.run("sbatch", "--parsable", *appended, *options, f"--wrap={script}").strip()

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED: what squeue says, or said about a job that has ended."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_for(self, job: str, *states: str, timeout: float = 60) -> str:
        """The first of `states` that the job is seen in."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                details = self.run("scontrol", "show", "job", job) + self.run("sinfo", "-N")
                raise AssertionError(f"job {job} is {state}, not {' or '.join(states)}, after {timeout} s\n{details}")
            time.sleep(0.2)
        return state

    def history(self, job: str) -> list[str]:
        """How each of the job's runs ended, as accounting knows it, and how the last one goes."""
        lines = self.run("sacct", "-DXnP", f"--jobs={job}", "--format=State").splitlines()
        return [line.split()[0] for line in lines]  # CANCELLED by 0

    def scancel(self, *jobs: str) -> None:
        self.run("scancel", *jobs)

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)

    def wait_for_node(self, node: str, *states: str, timeout: float = 90) -> None:
        deadline = time.monotonic() + timeout
        while (state := self.node_states()[node]) not in states:
            assert time.monotonic() < deadline, f"{node} is {state}, not {' or '.join(states)}, after {timeout} s"
            time.sleep(0.2)

    def address(self, machine: str) -> str:
        """Of head, n1, n2, or of this machine as nodes see it, by its host name."""
        lines = (self.dir / "etc/hosts").read_text().splitlines()
        return {name: address for address, name in map(str.split, lines)}[machine]

    def cut(self, node: str) -> None:
        """Take its link down. What runs on it goes on; Slurm notices after about 30 s."""
        self.tool("cut", node)

    def heal(self, node: str) -> None:
        """Only the link: Slurm looks for the node about a minute later, and what ran on it goes on until then."""
        self.tool("heal", node)

    def restore(self) -> None:
        """As new: no jobs, and all nodes idle. A slurmd that is started again makes itself known at once."""
        self.run("scancel", "--user=root")
        for node, state in self.node_states().items():
            self.heal(node)
            if state not in ("idle", "mix", "alloc", "comp"):
                self.tool("kill-slurmd", node)
            self.tool("start-slurmd", node)
        for node in self.node_states():
            self.wait_for_node(node, "idle")


@contextlib.contextmanager
def brought_up(*options: object) -> Iterator[Cluster]:
    """A cluster of its own. Skips where there can be none, unless DISTIL_TL_REQUIRE_SLURM=1 says that there must be."""
    # Not pytest's tmp_path, whose names are too long for Unix sockets.
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
            heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # its folder goes next, and nothing else knows of it
            try:
                dev_cluster("down", "--dir", directory)
            finally:
                signal.signal(signal.SIGINT, heard)
