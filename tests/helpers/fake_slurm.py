"""Stand-ins for the commands of Slurm: scripts in a folder, which keep their queue in a file (`slurm_commands.py`).

They support the options that launch uses, and behave as Slurm does: the id of an array means all of its tasks, waiting
tasks have no id of their own, and ended jobs are listed only with `--states=all`. A command fails with the message that
a test sets by `refuse`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.helpers import slurm_commands

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sacct", "sinfo")
# -S and -E: neither the packages nor the variables of the environment matter, and they take longer than the command.
SCRIPT = """#!/bin/sh
exec {python} -SE -c 'import sys; sys.path.append("{helpers}"); import slurm_commands
sys.exit(slurm_commands.run("{folder}", "{name}", sys.argv[1:]))' "$@"
"""


class FakeSlurm:
    """The queue, for a test to read and change.

    A job has `id`, `own`, `state`, `nodes`, `reason`, `script`, `comment`, `command` and `uid`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "queue"
        folder.mkdir(parents=True)
        for name in COMMANDS:
            values = {"python": sys.executable, "helpers": Path(__file__).parent, "folder": folder, "name": name}
            (folder / name).write_text(SCRIPT.format(**values))
            (folder / name).chmod(0o755)
        own = {"cluster": "fake", "private": False, "accounting": None, "limits": {}}
        self._write({"next": 7, "jobs": [], "refusals": {}, "calls": [], **own})

    @property
    def path(self) -> str:
        """PATH with these commands before all others."""
        return f"{self.folder}:{os.environ['PATH']}"

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        return {job["id"]: job for job in self._read()["jobs"]}

    def calls(self, command: str) -> list[list[str]]:
        """The arguments that a command was called with."""
        return [arguments for name, *arguments in self._read()["calls"] if name == command]

    def add(self, job: str, state: str = "PENDING", **fields: str) -> None:
        number = job.partition("_")[0]
        content = self._read()
        entry = {"id": job, "own": number, "state": state, "nodes": "", "reason": "None", "uid": os.getuid()}
        content["jobs"].append({**entry, **fields})
        self._write(content)

    def change(self, job: str, state: str, **fields: str) -> None:
        """Such as `change("7_2", "RUNNING", own="9", nodes="n1")`."""
        content = self._read()
        (found,) = (entry for entry in content["jobs"] if entry["id"] == job)
        found.update({"state": state, **fields})
        self._write(content)

    def forget(self, job: str) -> None:
        content = self._read()
        content["jobs"] = [entry for entry in content["jobs"] if entry["id"] != job]
        self._write(content)

    def account(self, **jobs: str) -> None:
        """Keep accounts of ended jobs, such as `account(_7="FAILED|2:0")`."""
        content = self._read()
        content["accounting"] = {job.removeprefix("_"): end for job, end in jobs.items()}
        self._write(content)

    def limit(self, **limits: str) -> None:
        """`infinite` or another `time` in the only partition, `nodes` (see sinfo), `MaxArraySize`."""
        content = self._read()
        content["limits"].update(limits)
        self._write(content)

    def configure(self, **values: Any) -> None:
        """Such as `cluster="other"`, `private=True` (users see only their jobs), `hold=True` (sbatch waits: `go`)."""
        self._write({**self._read(), **values})

    def refuse(self, command: str, words: str | None) -> None:
        content = self._read()
        content["refusals"][command] = words
        self._write(content)

    def _read(self) -> dict[str, Any]:
        return slurm_commands.read(str(self.file))

    def _write(self, content: dict[str, Any]) -> None:
        slurm_commands.replace(str(self.file), content)


def instead_of_slurm(tmp_path: Path, monkeypatch: Any) -> FakeSlurm:
    """Set up a test: these commands, no variables of a surrounding Slurm job, and an empty current folder `here`."""
    fake = FakeSlurm(tmp_path / "slurm-bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SUBMITIT_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH"):
            monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake


def without_slurm(monkeypatch: Any, folder: Path) -> None:
    """Set PATH to an empty folder, so that there are no Slurm commands, even if this machine has them."""
    (folder / "empty").mkdir()
    monkeypatch.setenv("PATH", str(folder / "empty"))


def fake_training(source: Path, body: str) -> Path:
    """A copy of the packages in which training is only `body`, a function of `args`, for jobs of a second."""
    for package in ("distil_tl", "launch"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(__file__).parents[2] / package, source / package, ignore=ignore)
    (source / "distil_tl/train.py").write_text(f"import json, os, pathlib, sys\ndef main(args):\n    {body}\n")
    return source
