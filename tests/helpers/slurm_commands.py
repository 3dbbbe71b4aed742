"""The stand-ins for Slurm's commands: what each of them does to the queue of `fake_slurm.FakeSlurm`.

A test may call a hundred of them, each in a new process. So this module imports at the top only what Python has in
itself: to start with `json`, `pathlib` and `re` takes twice as long.
"""

from __future__ import annotations

import fcntl
import marshal
import posix
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def read(file: str) -> dict[str, Any]:
    with open(file, "rb") as queue:  # noqa: PTH123
        found: dict[str, Any] = marshal.load(queue)
    return found


def replace(file: str, content: dict[str, Any]) -> None:
    """In one step, as a test may kill a command."""
    partial = f"{file}.{posix.getpid()}"
    with open(partial, "wb") as queue:  # noqa: PTH123
        marshal.dump(content, queue)
    posix.rename(partial, file)


def run(folder: str, command: str, arguments: list[str]) -> int:
    """Run one of the commands. Returns the exit status."""
    file = f"{folder}/queue"
    if arguments == ["--test-only"]:
        command = "sbatch_test"
    with open(f"{folder}/lock", "w") as lock:  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = read(file)
        content["calls"].append([command, *arguments])
        if command == "sbatch" and content.get("hold"):  # as when the controller is busy
            content["calls"].append(["sbatch-began"])
            replace(file, content)
            fcntl.flock(lock, fcntl.LOCK_UN)
            for _ in range(6000):  # at most a minute
                if "go" in posix.listdir(folder):
                    break
                time.sleep(0.01)
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = read(file)
        try:
            if content["refusals"].get(command):
                raise SystemExit(content["refusals"][command])
            globals()[command](content, arguments)
        finally:
            replace(file, content)
    return 0


def sbatch(content: dict[str, Any], arguments: list[str]) -> None:
    import re

    with open(arguments[-1], encoding="utf-8") as file:  # noqa: PTH123
        script = file.read()
    number, content["next"] = content["next"], content["next"] + 1
    array = re.search(r"^#SBATCH --array=0-(\d+)", script, re.MULTILINE)
    ids = [f"{number}_{task}" for task in range(int(array[1]) + 1)] if array else [str(number)]
    for job in ids:
        entry = {"id": job, "own": str(number), "state": "PENDING", "nodes": "", "reason": "Priority"}
        comment = re.search(r"^#SBATCH --comment=(.*)", script, re.MULTILINE)
        more = {"comment": comment[1] if comment else "(null)", "command": arguments[-1], "uid": posix.getuid()}
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
        users = [posix.getuid()] if "--me" in options else [int(user) for user in options["--user"].split(",")]
        seen = {posix.getuid()} if content["private"] else set(users)
        jobs = [job for job in jobs if job["uid"] in seen and job["uid"] in users]
    if options.get("--states") != "all":
        jobs = [job for job in jobs if job["state"] not in ENDED]
    if "--array" not in options:  # tasks that wait are one line then
        jobs = [job for job in jobs if job["state"] != "PENDING" or job["id"].partition("_")[2] in ("", "0")]
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
    import os

    while arguments[0].startswith("-"):
        arguments = arguments[1:] if "=" in arguments[0] or arguments[0] == "--unbuffered" else arguments[2:]
    os.execvp(arguments[0], arguments)


def selected(content: dict[str, Any], number: str) -> list[dict[str, Any]]:
    """Jobs by id: all tasks of an array by its id, or one task by its own id."""
    jobs = content["jobs"]
    array = [job for job in jobs if job["id"].partition("_")[0] == number]
    return array or [job for job in jobs if number in (job["id"], job["own"])]
