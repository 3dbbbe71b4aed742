"""Jobs that the cluster could never run are refused before anything is submitted or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import adaptive, sweep
from launch.squeue import TOKEN
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.submissions import PLAIN, refusal, submitted

NO_NODES = "allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    "reason",
    [
        NO_NODES,
        "sbatch: error: invalid partition specified: gpuu\nallocation failure: Invalid partition name specified",
        "allocation failure: Invalid account or account/partition combination specified",
    ],
)
def test_slurms_own_reason_and_nothing_is_written(slurm: FakeSlurm, capsys, reason: str) -> None:
    slurm.refuse("sbatch_test", reason)
    message = refusal(capsys)
    words = reason.rpartition("failure: ")[2]
    assert f"{words} (sbatch --test-only)" in message
    assert "add --no-test to submit it all the same" in message
    assert not list(Path().iterdir())
    assert not slurm.calls("sbatch")
    submitted("--no-test")


@pytest.mark.parametrize(
    "reason",
    [
        "sbatch: unrecognized option '--test-only'",
        "allocation failure: Unable to contact slurm controller (connect failure)",
        "allocation failure: Requested nodes are busy",
        "sbatch: fatal: Unable to process configuration file",
    ],
)
def test_where_slurm_can_not_say_the_job_is_submitted_with_a_warning(slurm: FakeSlurm, capsys, reason: str) -> None:
    slurm.refuse("sbatch_test", reason)
    submitted()
    assert "sbatch --test-only did not say that Slurm can run the job now: " in capsys.readouterr().err


def test_nodes_that_are_down_now_do_not_make_a_job_impossible(slurm: FakeSlurm, capsys) -> None:
    """Slurm calls both the same."""
    slurm.refuse("sbatch_test", NO_NODES)
    slurm.limit(nodes="gpu:a100:4(S:0-1)|64|1|idle gpu:a100:4|64|1|down* gpu:v100:8|64|2|drained")
    fits = ["slurm.nodes=2", "slurm.gpus_per_node=a100:4", "data.global_batch_size=64"]
    submitted(*fits)
    assert "nodes that the job needs are down or drained now; it waits for them" in capsys.readouterr().err
    for impossible in ("slurm.nodes=3", "slurm.gpus_per_node=a100:8", "slurm.cpus_per_task=17"):
        more = ["run_dir=runs/other", "data.global_batch_size=192"]
        assert "configuration is not available" in refusal(capsys, *fits, *more, impossible)


def test_a_time_above_the_limit_of_the_partition(slurm: FakeSlurm, capsys) -> None:
    """Slurm itself says so only if it enforces limits at submission."""
    slurm.limit(time="1:00:00")
    message = "slurm.time=1:01:00 is above the limit of the partition (1:00:00 in gpu); use a shorter time"
    assert message in refusal(capsys, "slurm.time=1:01:00")
    submitted("slurm.time=1:00:00")
    submitted("slurm.time=2:00:00", "slurm.qos=long", "run_dir=runs/other")  # a QOS may allow more
    slurm.limit(time="infinite")
    submitted("slurm.time=9-0", "run_dir=runs/another")


def test_the_question_has_the_script_that_is_submitted(slurm: FakeSlurm, tmp_path: Path) -> None:
    command = (slurm.folder / "sbatch").read_text()
    (slurm.folder / "sbatch").write_text(command.replace("exec", f"tee -a {tmp_path}/asked |", 1))
    submitted()
    given = TOKEN.sub("distil_tl-dry-run", slurm.jobs["7"]["script"])  # each submission has its own
    assert (tmp_path / "asked").read_text().strip() == given.strip()


def test_sweeps_and_searches_ask_too(slurm: FakeSlurm, search_file: Path, capsys) -> None:
    slurm.refuse("sbatch_test", NO_NODES)
    for command in (sweep, adaptive):
        assert command.main([str(search_file), *PLAIN[:3]]) == 2
        assert "Requested node configuration is not available" in capsys.readouterr().err
    assert not Path("sweeps").exists()
    assert not slurm.jobs
