"""A sweep and a search that older code recorded are still read, and resumed with the same trials."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from distil_tl.rundir import changes
from distil_tl.utils.args import flatten
from launch import adaptive, status, sweep, sync
from launch.sweep_file import read_sweep
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.paths import ROOT

RECORDED = ROOT / "tests" / "recorded" / "sweep"
COMPLETED, FAILED, MISSING = "small-ae2e0dbf13", "large-de782593c4", "middle-8ed95d5d15"
SWEEP = ["rates.yaml", "data.root=null", "--dir", "rates"]


@pytest.fixture
def recorded(slurm: FakeSlurm) -> Path:
    """A copy in the current folder."""
    shutil.copytree(RECORDED, ".", dirs_exist_ok=True)
    return Path("rates").absolute()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_key(value: Any, name: str) -> Any:
    """Nested dicts without the keys of that name, as code wrote them that did not have the key."""
    if not isinstance(value, dict):
        return value
    return {key: without_key(item, name) for key, item in value.items() if key != name}


def test_trials_of_the_sweep_file_have_the_same_names(recorded: Path) -> None:
    names = [trial.name for trial in read_sweep(Path("rates.yaml")).all_trials()]
    assert names == [COMPLETED, FAILED, MISSING]
    assert list(json.loads((recorded / "sweep.json").read_text())["trials"]) == names


def test_status_reads_the_sweep(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(recorded), "--json"]) == 0
    overview = json.loads(capsys.readouterr().out)
    assert overview["metric"] == "macro_f1"
    runs = {Path(run["run_dir"]).name: run for run in overview["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        COMPLETED: "completed", FAILED: "failed", MISSING: "missing"
    }  # fmt: skip
    assert list(runs) == [COMPLETED, FAILED, MISSING], "best first"
    completed = runs[COMPLETED]
    assert (completed["progress"], completed["stage"], completed["step"]) == (1.0, "head", 11)
    assert completed["best"]["macro_f1"] == pytest.approx(0.018414, abs=1e-6)
    assert completed["values"] == {"stages.head.lr": 0.1}


def test_the_same_command_submits_only_the_missing_trial(
    recorded: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(recorded)
    assert sweep.main(SWEEP) == 0
    assert "not submitted: 1 completed, 1 failed\n" in capsys.readouterr().out
    assert json.loads((recorded / MISSING / "submitted.json").read_text())["job_id"] == "7"
    assert list(slurm.jobs) == ["7"]
    after = contents(recorded)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"common.yaml", "sweep.json"}
    assert sweep.main(SWEEP) == 0
    assert list(slurm.jobs) == ["7"], "which is pending"
    assert sweep.main([*SWEEP, "--resubmit-failed"]) == 0
    assert json.loads((recorded / FAILED / "submitted.json").read_text())["job_id"] == "8"


def test_the_missing_trial_trains_with_the_recorded_configuration(recorded: Path, slurm: FakeSlurm) -> None:
    assert sweep.main(SWEEP) == 0
    old, new = (yaml.safe_load((recorded / name / "slurm/config.yaml").read_text()) for name in (COMPLETED, MISSING))
    old["stages"]["head"]["lr"], old["tracking"]["wandb"]["name"] = 0.3, "stages.head.lr=0.3"
    old["run_dir"] = str(recorded / MISSING)
    kept = {key: value for key, value in flatten(new).items() if key in flatten(old)}
    assert kept == flatten(old)


@pytest.mark.parametrize("key", ["optim.compression", "stages.*.augment"])
def test_a_key_newer_than_the_sweep_keeps_the_old_behaviour(
    recorded: Path, slurm: FakeSlurm, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated with a key that the recorded files lose. Its older meaning is not the default."""
    before, other = {"optim.compression": ("bf16", "none"), "stages.*.augment": ("light", "strong")}[key]
    monkeypatch.setattr(changes, "NEW_KEYS", changes.NEW_KEYS | {key: before})
    for path in [recorded / "common.yaml", *recorded.glob("*/config.yaml"), *recorded.glob("*/slurm/config.yaml")]:
        saved = without_key(yaml.safe_load(path.read_text()), key.rpartition(".")[2])
        if key == "stages.*.augment":  # data.augment is another key
            saved["data"]["augment"] = "none"
        path.write_text(yaml.safe_dump(saved, sort_keys=False))
    names = [trial.name for trial in read_sweep(Path("rates.yaml")).all_trials()]
    assert names == [COMPLETED, FAILED, MISSING]
    concrete = key.replace("*", "head")
    assert sweep.main([*SWEEP, f"{concrete}={other}"]) == 2, "set to something else, it is another sweep"
    assert f"{concrete}: was {before!r}, now {other!r}" in capsys.readouterr().err
    assert sweep.main(SWEEP) == 0
    assert list(slurm.jobs) == ["7"]
    trained = yaml.safe_load((recorded / MISSING / "slurm/config.yaml").read_text())
    assert flatten(trained)[concrete] == before


def test_sync_reads_the_runs(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main([str(recorded), "--dry-run"]) == 0
    assert f"rates/{COMPLETED}: 1 steps to send\n" in capsys.readouterr().out


@pytest.mark.parametrize("has_code", [True, False])
def test_the_same_search_continues_with_its_trials_and_its_code(
    recorded: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, has_code: bool
) -> None:
    """The code snapshot itself is not recorded."""
    from launch import optuna_driver
    from tests.helpers.adaptive_jobs import HERE, Jobs, states

    HERE.parent.mkdir()
    Path("search").rename(HERE)
    code = HERE.absolute() / "code/614521d83b99"
    if has_code:
        code.mkdir(parents=True)
    jobs = Jobs(slurm, lambda values: [0.5])
    monkeypatch.setattr(optuna_driver, "time", SimpleNamespace(sleep=jobs.sleep))
    args = ["search.yaml", "data.root=null", "--dir", str(HERE)]
    assert adaptive.main(args) == 0
    assert not slurm.jobs, "the two trials that it has are enough"
    assert adaptive.main([*args, "--trials=3"]) == 0
    assert states() == {"COMPLETE": 3}
    assert list(slurm.jobs) == ["7"]
    assert (f"\ncd {code} || exit 2\n" in slurm.jobs["7"]["script"]) is has_code
    trials = json.loads((HERE / "sweep.json").read_text())["trials"]
    assert list(trials)[:2] == ["41a527e703", "fb0e0d1721"]
