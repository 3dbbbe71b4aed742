"""`python -m launch.task`: rank 0 requeues the job of a preempted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_tl import train as training
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_PREEMPTED, LostRanksError, NonFiniteError, PreemptedError, UserError
from distil_tl.utils.job_outcome import MOST_PREEMPTED, VARIABLE
from launch import task
from launch.task import train_and_requeue
from tests.helpers.fake_slurm import FakeSlurm


@pytest.mark.parametrize(
    ("status", "environ", "requeues"),
    [
        (EXIT_PREEMPTED, {"SLURM_PROCID": "0"}, True),
        (EXIT_PREEMPTED, {"SLURM_PROCID": "1"}, False),
        (EXIT_PREEMPTED, {"SLURM_PROCID": "0", "RANK": "1"}, False),  # torchrun starts several in a Slurm task
        (EXIT_PREEMPTED, {"SLURM_PROCID": "1", "RANK": "0"}, True),
        (EXIT_PREEMPTED, {}, True),
        (0, {}, False),
        (1, {}, False),
        (2, {}, False),
    ],
)
def test_rank_0_requeues_a_preempted_job(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, status: int, environ: dict[str, str], requeues: bool
) -> None:
    slurm.add("7", "RUNNING")
    seen = []

    def train(args: list[str]) -> int:
        seen.append(args)
        return status

    monkeypatch.setattr(training, "main", train)
    for key, value in {**environ, "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(key, value)
    assert train_and_requeue(["a.yaml"]) == status
    assert bool(slurm.calls("scontrol")) is requeues
    assert task.main(["a.yaml", "slurm.nodes=2", "seed=1"]) == status
    assert seen == [["a.yaml"], ["a.yaml", "seed=1"]]


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (None, [], []),
        (PreemptedError("stopped"), ["saved"], ["saved", "preempted"]),
        (UserError("no such folder"), [], ["refused"]),
        (NonFiniteError("the loss is nan"), ["saved"], ["saved", "failed"]),
        (LostRanksError("rank 1 was killed"), ["saved"], ["saved"]),  # as if this rank had been killed, too
        (PreemptedError("stopped"), ["refused"], ["refused"]),  # by Slurm, as another rank has refused the input
        (PreemptedError("stopped"), ["preempted"] * MOST_PREEMPTED, ["preempted"] * MOST_PREEMPTED + ["failed"]),
        (PreemptedError("stopped"), ["preempted"] * MOST_PREEMPTED + ["saved"], None),
    ],
)
def test_the_batch_script_is_told_how_the_run_ends(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    error: BaseException | None, before: list[str], after: list[str] | None,
) -> None:  # fmt: skip
    def body() -> None:
        if error is not None:
            raise error

    slurm.add("7", "RUNNING")
    outcome = tmp_path / "outcome"
    outcome.write_text("".join(f"{word}\n" for word in before))
    monkeypatch.setattr(training, "main", lambda args: run_command("distil_tl.train", body))
    monkeypatch.setenv(VARIABLE, str(outcome))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    train_and_requeue([])
    found = outcome.read_text().split()
    assert found == (after if after is not None else [*before, "preempted"])
    assert bool(slurm.calls("scontrol")) is (found[-1:] == ["preempted"])
