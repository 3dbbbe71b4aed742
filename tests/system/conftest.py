"""A real Slurm for the tests with the marker `slurm`."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.concurrent_tests import THREADS, ConcurrentTests, selected
from tests.helpers.slurm_cluster import Cluster, brought_up, partitions
from tests.helpers.slurm_jobs import Inputs
from tests.helpers.wandb_server import serving


@pytest.fixture(scope="session")
def slurm_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster with two nodes for each concurrent test that may run at the same time."""
    threads = max(1, min(THREADS, len(selected(request.session))))
    with brought_up("--nodes", 2 * threads) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def concurrent_tests(
    request: pytest.FixtureRequest, slurm_cluster: Cluster, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ConcurrentTests]:
    """The concurrent tests that were selected, running."""
    bodies = selected(request.session)
    with serving(slurm_cluster.address(socket.gethostname()), tells=True) as server:
        inputs = Inputs(folder, tmp_path_factory.mktemp("inputs"), server)
        tracked = dataclasses.replace(slurm_cluster, environment={**slurm_cluster.environment, **server.environment})
        names = [f"pair{i}" for i in range(min(THREADS, len(bodies)))]
        running = ConcurrentTests(bodies, partitions(tracked, names), inputs, tmp_path_factory.mktemp("concurrent"))
        yield running
        running.stop()
    # If pytest stops early, threads may still run a body. They end when the cluster is taken down.
