"""Stand-ins for the commands of Slurm: scripts in a folder, which keep their queue in a JSON file.

They support the options that launch uses, and behave as Slurm does: the id of an array means all of its tasks, waiting
tasks have no id of their own, and ended jobs are listed only with `--states=all`. A command fails with the message that
a test sets by `refuse`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sacct", "sinfo")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


class FakeSlurm:
    """The queue, for a test to read and change.

    A job has `id`, `own`, `state`, `nodes`, `reason`, `script`, `comment`, `command` and `uid`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "queue.json"
        folder.mkdir(parents=True)
        for name in COMMANDS:
            (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -SE {__file__} {folder} {name} "$@"\n')
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
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def _write(self, content: dict[str, Any]) -> None:
        replace(self.file, content)


def replace(file: Path, content: dict[str, Any]) -> None:
    """In one step, as a test may kill a command."""
    partial = file.with_name(f"queue.{os.getpid()}")
    partial.write_text(json.dumps(content))
    partial.replace(file)


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


def run(folder: Path, command: str, arguments: list[str]) -> int:
    """Run one of the commands. Returns the exit status."""
    file = folder / "queue.json"
    if arguments == ["--test-only"]:
        command = "sbatch_test"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = json.loads(file.read_text())
        content["calls"].append([command, *arguments])
        if command == "sbatch" and content.get("hold"):  # as when the controller is busy
            content["calls"].append(["sbatch-began"])
            replace(file, content)
            fcntl.flock(lock, fcntl.LOCK_UN)
            for _ in range(6000):  # not for ever, should a test fail
                if (folder / "go").exists():
                    break
                time.sleep(0.01)
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = json.loads(file.read_text())
        try:
            if content["refusals"].get(command):
                raise SystemExit(content["refusals"][command])
            globals()[command](content, arguments)
        finally:
            replace(file, content)
    return 0


def sbatch(content: dict[str, Any], arguments: list[str]) -> None:
    script = Path(arguments[-1]).read_text()
    number, content["next"] = content["next"], content["next"] + 1
    array = re.search(r"^#SBATCH --array=0-(\d+)", script, re.MULTILINE)
    ids = [f"{number}_{task}" for task in range(int(array[1]) + 1)] if array else [str(number)]
    for job in ids:
        entry = {"id": job, "own": str(number), "state": "PENDING", "nodes": "", "reason": "Priority"}
        comment = re.search(r"^#SBATCH --comment=(.*)", script, re.MULTILINE)
        more = {"comment": comment[1] if comment else "(null)", "command": arguments[-1], "uid": os.getuid()}
        content["jobs"].append({**entry, **more, "script": script})
    if content.get("lost"):  # the answer
        raise SystemExit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    sys.stdout.write(f"Submitted batch job {number}\n")


def sbatch_test(content: dict[str, Any], arguments: list[str]) -> None:
    script = sys.stdin.read()
    assert script.startswith("#!")
    sys.stderr.write("sbatch: Job 1 to start at 2026-11-28T19:26:35 using 1 processors on nodes n1 in partition gpu\n")


def sinfo(content: dict[str, Any], arguments: list[str]) -> None:
    limits = content["limits"]
    for kind in limits.get("nodes", "gpu:8|64|4|idle").split():
        line = arguments[-1].removeprefix("--format=")
        values = ["gpu*", "gpu", "up", limits.get("time", "infinite"), *kind.split("|")]
        for letter, value in zip("PRalGcDT", values, strict=True):
            line = line.replace(f"%{letter}", value)
        sys.stdout.write(line + "\n")


def squeue(content: dict[str, Any], arguments: list[str]) -> None:
    options = dict(argument.partition("=")[::2] for argument in arguments)
    jobs = content["jobs"]
    if "--jobs" in options:
        jobs = selected(content, options["--jobs"])
        if not jobs:
            raise SystemExit("slurm_load_jobs error: Invalid job id specified")
    else:
        users = [os.getuid()] if "--me" in options else [int(user) for user in options["--user"].split(",")]
        seen = {os.getuid()} if content["private"] else set(users)
        jobs = [job for job in jobs if job["uid"] in seen and job["uid"] in users]
    if options.get("--states") != "all":
        jobs = [job for job in jobs if job["state"] not in ENDED]
    if "--array" not in options:  # tasks that wait are one line then
        jobs = [job for job in jobs if job["state"] != "PENDING" or not re.search("_[1-9]", job["id"])]
    letters = {"%i": "id", "%A": "own", "%T": "state", "%N": "nodes", "%r": "reason", "%L": "left"}
    letters |= {"%k": "comment", "%o": "command"}
    for job in jobs:
        if options.get("--Format") == "State,RestartCnt":
            sys.stdout.write(f"{job['state']:<20}{job.get('restarts', 0):<20}\n")
            continue
        line = options["--format"]
        for letter, name in letters.items():
            line = line.replace(letter, job.get(name, ""))
        sys.stdout.write(line + "\n")


def scontrol(content: dict[str, Any], arguments: list[str]) -> None:
    if arguments == ["show", "config"]:
        private = "jobs,usage" if content["private"] else "none"
        sys.stdout.write(f"AccountingStoreFlags    = (null)\nClusterName             = {content['cluster']}\n")
        sys.stdout.write(f"MaxArraySize            = {content['limits'].get('MaxArraySize', 1001)}\n")
        sys.stdout.write(f"PrivateData             = {private}\n")
        return
    if arguments[0] == "update":
        array, throttle = (argument.partition("=")[2] for argument in arguments[1:])
        for task in selected(content, array):
            task["throttle"] = throttle
        if any(task["state"] in ENDED for task in selected(content, array)):
            raise SystemExit(f"{array}_0: Job has already finished\n{array}_1: No error")
        return
    assert arguments[0] == "requeue", arguments
    jobs = selected(content, arguments[1])
    if not jobs:
        raise SystemExit("Invalid job id specified")
    for job in jobs:  # those that were cancelled, too
        job.update(state="PENDING", nodes="", reason="BeginTime")


def scancel(content: dict[str, Any], arguments: list[str]) -> None:
    for number in arguments:
        for job in selected(content, number):
            job["state"] = "CANCELLED"


def sacct(content: dict[str, Any], arguments: list[str]) -> None:
    if content["accounting"] is None:
        raise SystemExit("Slurm accounting storage is disabled")
    for job in arguments[-1].removeprefix("--jobs=").split(","):
        if job in content["accounting"]:
            sys.stdout.write(f"{job}|{content['accounting'][job]}\n")


def srun(content: dict[str, Any], arguments: list[str]) -> None:
    """Replace the process by the command to start."""
    while arguments[0].startswith("-"):
        arguments = arguments[1:] if "=" in arguments[0] or arguments[0] == "--unbuffered" else arguments[2:]
    os.execvp(arguments[0], arguments)


def selected(content: dict[str, Any], number: str) -> list[dict[str, Any]]:
    """Jobs by id: all tasks of an array by its id, or one task by its own id."""
    jobs = content["jobs"]
    array = [job for job in jobs if job["id"].partition("_")[0] == number]
    return array or [job for job in jobs if number in (job["id"], job["own"])]


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
