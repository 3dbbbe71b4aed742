"""launch/job.sh, the part of all batch scripts that passes signals on and requeues a job, with stand-ins for Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.executor import JOB_LINES
from tests.helpers.paths import ROOT
from tests.helpers.slurm_jobs import wait_until

# As Slurm's: it waits for USR2 in a thread, here by polling, and dies of TERM.
SRUN = f"""#!{sys.executable} -S
import pathlib, signal, sys
here = pathlib.Path()
(here / "started").touch()
while not signal.sigtimedwait([signal.SIGUSR2], 10):
    pass
(here / "slurm-7.outcome").write_text("saved\\npreempted\\n")
sys.exit(3)
"""


class Script:
    """A batch script that consists of launch/job.sh and `watch_run` with a command."""

    def __init__(self, folder: Path, *, state: str = "RUNNING", restarts: int = 0) -> None:
        self.folder = folder
        self.outcome = folder / "slurm-7.outcome"
        (folder / "bin").mkdir()
        self.command("squeue", f'echo "$@" >> {folder}/calls; printf "%-20s%-20s\\n" {state} {restarts}')
        self.command("scontrol", f'echo scontrol "$@" >> {folder}/calls')
        self.command("sleep", "exec /bin/sleep 0.1")

    def command(self, name: str, lines: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)

    def start(self, command: str, before: str = "", **environ: str) -> subprocess.Popen[str]:
        text = f"set -e\n{JOB_LINES.read_text()}{before}\nwatch_run {command}\n"
        return subprocess.Popen(
            ["bash", "-c", text], cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environ},
        )  # fmt: skip

    def run(self, command: str, before: str = "", **environ: str) -> tuple[int, bool]:
        """Exit status, and whether the job was requeued."""
        process = self.start(command, before, **environ)
        output, _ = process.communicate(timeout=60)
        return process.returncode, "is requeued" in output

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("name", ["train", "array", "torchrun"])
def test_the_templates_have_the_same_lines(name: str) -> None:
    assert JOB_LINES.read_text() in (ROOT / f"slurm/{name}.sbatch").read_text()


@pytest.mark.parametrize(
    ("status", "earlier", "notes", "requeued", "left"),
    [
        (0, "", "saved", False, None),
        (3, "", "saved preempted", True, "saved preempted"),
        (143, "", "preempted", True, "preempted"),  # Slurm ended the other processes
        (1, "", "saved failed", False, None),
        (143, "", "failed", False, None),
        (137, "", "refused", False, None),
        (1, "", "", False, ""),  # Python could not start
        (2, "", "", False, ""),
        (137, "", "", True, "killed"),  # for example by the kernel, as memory ran out
        (139, "saved killed", "saved", True, "saved killed saved killed"),
        (137, "saved killed", "", False, None),  # again, without a checkpoint in between
        (3, "saved preempted", "preempted", True, "saved preempted started preempted"),
        (
            1,
            "saved preempted",
            "",
            False,
            "saved preempted started",
        ),  # what an earlier start noted is not about this one
        (137, "saved preempted", "", True, "saved preempted started killed"),
        (137, "saved preempted started killed", "", False, None),
    ],
)
def test_what_follows_from_the_end_of_a_run(
    tmp_path: Path, status: int, earlier: str, notes: str, requeued: bool, left: str | None
) -> None:
    script = Script(tmp_path)
    if earlier:
        script.outcome.write_text(earlier.replace(" ", "\n") + "\n")
    run = f"for note in {notes}; do echo $note >> $DISTIL_TL_OUTCOME; done; exit {status}"
    assert script.run(f"sh -c '{run}'") == (status, requeued)
    assert (" ".join(script.outcome.read_text().split()) if script.outcome.exists() else None) == (left or None)


@pytest.mark.parametrize(("state", "restarts"), [("CANCELLED", 0), ("PENDING", 1), ("COMPLETING", 0), ("RUNNING", 1)])
def test_a_job_that_no_longer_runs_is_not_requeued(tmp_path: Path, state: str, restarts: int) -> None:
    """The last case is a job that was restarted elsewhere, as this node was cut off."""
    script = Script(tmp_path, state=state, restarts=restarts)
    assert script.run("sh -c 'echo preempted >> $DISTIL_TL_OUTCOME; exit 3'") == (3, False)
    assert len(script.calls()) == 1


def test_slurm_is_asked_again_and_a_task_of_an_array_requeues_itself(tmp_path: Path) -> None:
    script = Script(tmp_path)
    again = f'echo "$@" >> {tmp_path}/calls; [ -e {tmp_path}/down ] || {{ touch {tmp_path}/down; exit 1; }}; '
    script.command("squeue", again + 'printf "%-20s%-20s\\n" RUNNING 0')
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert script.run("sh -c 'echo preempted >> $DISTIL_TL_OUTCOME; exit 3'", **array) == (3, True)
    asked, asked_again, requeued = script.calls()
    assert asked == asked_again
    assert "--jobs=5_2" in asked
    assert requeued == "scontrol requeue 5_2"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_shell_reaches_the_run(tmp_path: Path, number: signal.Signals) -> None:
    script = Script(tmp_path)
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    process = script.start("srun")
    wait_until((tmp_path / "started").exists)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, "job 7 is requeued" in output) == (3, True)


def test_a_signal_before_the_run_is_started(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script.run("touch started", before="kill -TERM $$") == (3, True)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("has_option", [True, False])
def test_the_run_starts_with_blocked_signals(tmp_path: Path, has_option: bool) -> None:
    script = Script(tmp_path)
    if not has_option:  # as before coreutils 8.31
        script.command("env", 'case "$1" in --block*) exit 125;; esac; exec /usr/bin/env "$@"')
    code = "import signal; print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []) ))"
    process = script.start(f"{sys.executable} -S -c '{code}'")
    output, _ = process.communicate(timeout=60)
    assert output.split() == [str(int(number)) for number in sorted((signal.SIGTERM, signal.SIGUSR2))]
