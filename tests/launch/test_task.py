"""`python -m launch.task`: rank 0 requeues the job of a preempted run."""

from __future__ import annotations

import pytest

from distil_tl import train as training
from distil_tl.utils.errors import EXIT_PREEMPTED
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
