"""Submission of `distil-tl select`: what the job gets, and what it notes for launch.status."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from distil_tl.cli import main as console
from distil_tl.cli import select as command
from distil_tl.selection.config import GridConfig
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_PREEMPTED, LostRanksError, NonFiniteError
from distil_tl.utils.job_outcome import VARIABLE
from launch.job import Selection
from launch.records import read_record
from launch.select import main, texts
from launch.selection_job import select_and_record
from launch.status import read_overview
from launch.task import requeue_if_preempted
from tests.helpers.arguments import SMALLEST
from tests.helpers.fake_slurm import FakeSlurm

GRID = [f"candidates=[{SMALLEST},resnet18]", "sizes=[32,40]", "crops=squash"]
GIVEN = [*GRID, "model.weights=none", "metric=macro_f1", "slurm.gpus_per_node=0", "slurm.tasks_per_node=2"]


def task_of(folder: Path) -> Selection:
    from submitit.core.utils import DelayedSubmission

    found = DelayedSubmission.load(folder / "slurm/7_submitted.pkl").function
    assert isinstance(found, Selection)
    return found


def test_the_job_gets_the_grid_and_the_configuration(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["select", "--submit", *GIVEN, "--out", "found", "--budget", "1h"]) == 0
    folder = Path("found").absolute()
    assert (read_record(folder) or {})["job_id"] == "7"
    assert f"submitted job 7: {folder}, 1 node x 2 CPU tasks" in capsys.readouterr().out
    task = task_of(folder)
    assert (task.folder, task.cwd) == (str(folder), str(Path.cwd()))
    assert task.arguments[-4:] == ("--out", str(folder), "--budget", "1h")
    grid, config, _ = command.read(task.arguments[:-4])
    expected = command.read([*GRID, "model.weights=none", "metric=macro_f1"])
    assert (grid, config.stages, config.metric) == (expected[0], expected[1].stages, "macro_f1")
    (run, _), overview = read_overview(folder).rows[0], read_overview(folder)
    assert (run.state, overview.metric, run.data) == ("pending", "macro_f1", "embedded digits")


def test_help_has_the_keys_of_the_grid_and_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for key in (*(key.name for key in fields(GridConfig)), "slurm.nodes"):
        assert any(line.strip().startswith(f"{key}=") for line in lines), key


def test_a_dry_run_writes_nothing(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GIVEN, "--dry-run"]) == 0
    assert "#SBATCH --ntasks-per-node=2" in capsys.readouterr().out
    assert not list(Path().iterdir())


def test_a_login_node_needs_no_gpu(slurm: FakeSlurm) -> None:
    more = ["distributed.device=cuda", "slurm.gpus_per_node=2", "compile=all"]
    assert main([*(arg for arg in GIVEN if "gpus" not in arg and "device" not in arg), *more, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["candidates=renset18"], "resnet18"),
        (["slurm.nodse=2"], "slurm.nodse"),
        (["--budget", "1"], "10m"),
        (["--out", "a%j"], "contains %"),
        (["data.global_batch_size=9"], "divided"),
        (["stages.full.search.lr=[0.1,0.2]"], "stages.full.search"),
    ],
)
def test_what_can_not_work_is_not_submitted(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], more: list[str], named: str
) -> None:
    assert main([*GIVEN, *more]) == 2
    assert named in capsys.readouterr().err
    assert not slurm.calls("sbatch")


def test_a_folder_that_a_job_uses_is_not_used_by_another_one(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(GIVEN) == 0
    assert main(GIVEN) == 2
    assert "job 7 (PENDING) is using" in (said := capsys.readouterr().err)
    assert "name another folder with --out" in said


def test_lists_are_written_so_that_they_are_read() -> None:
    grid = command.read([*GRID, "candidates=['a b','timm/x*']"])[0]
    assert command.read(texts(grid))[0] == grid


def test_status_tells_how_it_ended(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.add("7", "RUNNING")
    folder = tmp_path / "found"
    (folder / "cells").mkdir(parents=True)
    state: dict[str, Any] = {}

    def selected(arguments: object) -> int:
        state["during"] = read_overview(folder).rows[0][0].state
        (folder / "select.json").write_text(json.dumps({"best": {"top1": 0.75, "loss": 1.0}}))
        return int(state["status"])

    monkeypatch.setattr(command, "main", selected)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for status, after in ((EXIT_PREEMPTED, "stopped"), (0, "completed"), (1, "failed"), (0, "completed")):
        state["status"] = status
        slurm.change("7", "RUNNING")
        assert select_and_record([], folder) == status
        slurm.forget("7")
        slurm.add("7", "COMPLETED")
        assert state["during"] == "running"
        assert read_overview(folder).rows[0][0].state == after
    assert (read_overview(folder).rows[0][0].best or {})["top1"] == 0.75


def test_a_job_that_never_completes_a_cell_ends(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cells").mkdir()
    monkeypatch.setattr(command, "main", lambda arguments: EXIT_PREEMPTED)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    found = []
    for restarts in range(7):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        if restarts == 2:
            (tmp_path / "cells" / "one.json").write_text("{}")
        found.append(select_and_record([], tmp_path))
    assert found == [EXIT_PREEMPTED] * 6 + [1]
    assert "before it could complete a cell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "noted"),
    [(LostRanksError("rank 1 was killed"), ["saved"]), (NonFiniteError("the loss is nan"), ["saved", "failed"])],
)
def test_a_job_that_loses_a_rank_is_left_to_the_batch_script_to_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, noted: list[str]
) -> None:
    def body() -> None:
        raise error

    (tmp_path / "outcome").write_text("saved\n")
    monkeypatch.setattr(command, "main", lambda arguments: run_command("distil-tl select", body))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome"))
    assert requeue_if_preempted(lambda: select_and_record([], tmp_path)) == 1
    assert (tmp_path / "outcome").read_text().split() == noted
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
