"""On a real Slurm: a run that is requeued, by hand and when its time is up, goes on in one run of W&B's."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import small_args
from tests.ranks import lines
from tests.slurm_cluster import Cluster
from tests.test_slurm import SLOWLY, Run
from tests.wandb_server import Server, serving, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.fixture
def server(slurm_cluster: Cluster) -> Iterator[Server]:
    """Where nodes can reach it, at this machine's address on their network."""
    with serving(slurm_cluster.address(socket.gethostname()), tells=True) as found:
        yield found
    slurm_cluster.restore()


def test_a_run_that_is_requeued_is_one_run(
    slurm_cluster: Cluster, server: Server, folder: Path, tmp_path: Path
) -> None:
    folders = {f"WANDB_{kind}_DIR": str(tmp_path / kind) for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    environment = {**slurm_cluster.environment, **server.environment, **folders}
    cluster = dataclasses.replace(slurm_cluster, environment=environment)
    (tmp_path / "slowly").mkdir()
    (tmp_path / "slowly" / "sitecustomize.py").write_text(SLOWLY)
    args = [*small_args(folder), "stages.full.epochs=5", "checkpoint.every_steps=5", "tracking.wandb.mode=online"]
    run = Run(cluster, tmp_path / "run", tmp_path / "slowly", args, 0.4)
    wait_for_step(run.run_dir, 8)
    cluster.run("scontrol", "requeue", run.job)
    cluster.wait_for(run.job, "PENDING", "COMPLETED")
    run.wait_for_step(18)
    cluster.run("scancel", "--signal=USR2", run.job)  # as Slurm warns of the end of its time
    cluster.wait_for(run.job, "COMPLETED", timeout=150)
    assert len(cluster.history(run.job)) == 3
    assert json.loads((run.run_dir / "summary.json").read_text())["status"] == "completed"
    steps = [line["step"] for line in lines(run.run_dir, window="interval")]
    assert steps == list(range(1, 37))
    assert server.steps(run.run_dir) == steps
    assert server.run(run.run_dir)["state"] == "finished"
