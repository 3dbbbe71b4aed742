"""Images on the nodes' own disks, on a real Slurm of two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.arguments import small_args
from tests.helpers.ranks import run_ranks, train
from tests.helpers.slurm_cluster import Cluster
from tests.system.test_slurm import SLOWLY, Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    yield slurm_cluster
    slurm_cluster.restore()


@pytest.fixture(scope="module")
def slowly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slowly")
    (folder / "sitecustomize.py").write_text(SLOWLY)
    return folder


@pytest.fixture(scope="module")
def job_args(folder: Path) -> list[str]:
    return [*small_args(folder), "stages.full.epochs=4", "checkpoint.every_steps=5"]


@pytest.fixture(scope="module")
def reference(job_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out of reading the folder."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert run_ranks(2, train, [*job_args, f"run_dir={run_dir}"]) == [0, 0]
    return run_dir


def test_each_node_copies_once_and_has_it_still_when_the_job_comes_back(
    cluster: Cluster, folder: Path, job_args: list[str], reference: Path, tmp_path: Path, slowly: Path
) -> None:
    disks = tmp_path / "disks"
    args = [*job_args, f"data.stage_to={disks}/$SLURMD_NODENAME/scratch"]
    run = Run(cluster, tmp_path / "run", slowly, args, 0.2, nodes=2, gpus_per_node=1)
    run.wait_for_step(8)
    copies = {path: path.stat().st_ino for path in disks.glob("*/scratch/*/ready/images/*/*/*.png")}
    assert {path.relative_to(disks).parts[0] for path in copies} == {"n1", "n2"}
    assert len(copies) == 2 * len(list(folder.rglob("*.png")))
    cluster.run("scontrol", "requeue", run.job)
    run.finished(reference)
    assert run.said().count("images: 83 files, ") == 1, "rank 0 speaks of its own node"
    assert run.said().count("using the existing copy") == 1
    assert {path: path.stat().st_ino for path in disks.glob("*/scratch/*/ready/images/*/*/*.png")} == copies


def test_a_node_whose_disk_is_no_good_reads_the_folder(
    cluster: Cluster, folder: Path, job_args: list[str], reference: Path, tmp_path: Path, slowly: Path
) -> None:
    disks = tmp_path / "disks"
    disks.mkdir()
    (disks / "n2").write_text("a file where the disk should be")
    args = [*job_args, f"data.stage_to={disks}/$SLURMD_NODENAME"]
    run = Run(cluster, tmp_path / "run", slowly, args, 0, nodes=2, gpus_per_node=1)
    run.finished(reference)
    assert "data.stage_to on node 1 (" in run.said()
    assert f"Not a directory: {disks}/n2" in run.said()
    assert f"reading the images from {folder}" in run.said()
    assert len(list((disks / "n1").glob("*/ready/images/*/*/*.png"))) == 83
