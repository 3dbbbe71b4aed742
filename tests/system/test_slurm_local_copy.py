"""Images copied to the nodes' own disks, on a real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.concurrent_tests import concurrent
from tests.helpers.slurm_cluster import Partition
from tests.helpers.slurm_jobs import Inputs, Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.xdist_group("slurm")]


@concurrent()
def test_each_node_copies_once_and_the_requeued_job_uses_the_copy(
    partition: Partition, inputs: Inputs, tmp_path: Path
) -> None:
    disks = tmp_path / "disks"
    args = [*inputs.untracked_args, f"data.stage_to={disks}/$SLURMD_NODENAME/scratch"]
    run = Run(partition, inputs, tmp_path / "run", args, 1.5, nodes=2, gpus_per_node=1)
    run.wait_for_step(7)
    copies = {path: path.stat().st_ino for path in disks.glob("*/scratch/*/ready/images/*/*/*.png")}
    assert {path.relative_to(disks).parts[0] for path in copies} == set(partition.nodes)
    assert len(copies) == 2 * len(list(inputs.images.rglob("*.png")))
    partition.run("scontrol", "requeue", run.job)
    run.wait_until_same_as(inputs.reference())
    assert run.output().count("images: 83 files, ") == 1, "rank 0 reports its own node"
    assert run.output().count("using the existing copy") == 1
    assert {path: path.stat().st_ino for path in disks.glob("*/scratch/*/ready/images/*/*/*.png")} == copies


@concurrent()
def test_a_node_with_an_unusable_disk_reads_the_folder(partition: Partition, inputs: Inputs, tmp_path: Path) -> None:
    disks, node = tmp_path / "disks", partition.nodes[1]
    disks.mkdir()
    (disks / node).write_text("a file where the disk should be")
    args = [*inputs.untracked_args, f"data.stage_to={disks}/$SLURMD_NODENAME"]
    run = Run(partition, inputs, tmp_path / "run", args, nodes=2, gpus_per_node=1)
    run.wait_until_same_as(inputs.reference())
    assert "data.stage_to on node 1 (" in run.output()
    assert f"Not a directory: {disks}/{node}" in run.output()
    assert f"reading the images from {inputs.images}" in run.output()
    assert len(list((disks / partition.nodes[0]).glob("*/ready/images/*/*/*.png"))) == 83
