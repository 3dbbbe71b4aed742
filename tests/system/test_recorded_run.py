"""A run directory recorded by the code of 21 November 2026, before modules moved into folders, is read and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import distil_tl
from distil_tl import evaluate, train
from distil_tl.config import Config, load, load_saved, run_name
from distil_tl.inference import restore_model
from distil_tl.rundir import changes
from distil_tl.utils.args import flatten, plain
from tests.helpers.paths import ROOT
from tests.helpers.ranks import lines
from tests.helpers.runs import summary_of
from tests.helpers.same_run import timeless

RECORDED = ROOT / "tests" / "recorded" / "run"
ARGS = [
    "data.root=images", "data.image_size=32", "data.global_batch_size=6", "data.workers=0", "data.augment=none",
    "model.name=shufflenet_v2_x0_5", "model.weights=none", "stages.head.epochs=2", "stages.head.lr=0.01",
    "stages.full.lr=0.001", "optim.name=sgd", "tracking.log_every=1", "checkpoint.keep=1", "distributed.device=cpu",
    "run_dir=run",
]  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recorded run, whose head stage is complete, in the current folder."""
    shutil.copytree(RECORDED, tmp_path / "recorded", symlinks=True)
    monkeypatch.chdir(tmp_path / "recorded")
    return Path("run")


def test_the_same_command_finds_it_completed(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (recorded / "metrics.jsonl").read_bytes()
    assert train.main([*ARGS, "stages.full.epochs=0"]) == 0
    assert "holds this run, completed" in capsys.readouterr().out
    assert (recorded / "metrics.jsonl").read_bytes() == before
    assert (recorded / "report.html").exists(), "the recorded directory has none"


def test_a_further_stage_is_trained_as_it_was_then(recorded: Path) -> None:
    assert train.main([*ARGS, "stages.full.epochs=2"]) == 0
    continued: list[dict[str, Any]] = json.loads(Path("continued.json").read_text())
    found = timeless(lines(recorded, stage="full"))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in continued], rel=1e-5)
    for line, then in zip(found, continued, strict=True):
        same = {key: line[key] for key in then}  # fields may be added
        assert {**same, "loss": 0, "macro_f1": 0} == {**then, "loss": 0, "macro_f1": 0}
    assert summary_of(recorded)["status"] == "completed"


def test_it_can_be_evaluated_and_loaded(recorded: Path) -> None:
    then = json.loads((recorded / "evaluation.json").read_text())
    assert evaluate.main([str(recorded), "--json", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    for key in ("n", "top1", "top5", "macro_f1", "confusion_matrix", "per_class"):
        assert found[key] == then[key], key
    assert found["loss"] == pytest.approx(then["loss"], rel=1e-6)
    assert distil_tl.load(recorded).classes == ["dark", "grey", "light"]


def test_another_configuration_is_refused_by_name(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*ARGS, "stages.full.epochs=1", "optim.weight_decay=0.5"]) == 2
    assert "optim.weight_decay: was 0.01, now 0.5" in capsys.readouterr().err


# Keys that are newer than a saved configuration.


def test_each_key_missing_from_the_recorded_configuration_is_in_new_keys() -> None:
    saved = flatten(yaml.safe_load((RECORDED / "run" / "config.yaml").read_text())).keys()
    known = changes.new_keys(Config().stages).keys()
    assert [key for key in flatten(plain(load([])[1])) if key not in saved and key not in known] == []


@pytest.fixture
def new_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `data.hflip` and `stages.*.layer_decay` had been added now, with other defaults than before."""
    monkeypatch.setattr(changes, "NEW_KEYS", changes.NEW_KEYS | {"data.hflip": False, "stages.*.layer_decay": 0.5})


def without_new_keys(run_dir: Path) -> None:
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    del saved["data"]["hflip"]
    for stage in saved["stages"].values():
        del stage["layer_decay"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))


def test_a_key_missing_from_a_saved_configuration_keeps_the_old_behaviour(
    recorded: Path, new_keys: None, capsys: pytest.CaptureFixture[str]
) -> None:
    without_new_keys(recorded)
    config, source = load(ARGS)
    assert (config.data.hflip, config.stages["head"].layer_decay, config.stages["full"].layer_decay) == (
        False,
        0.5,
        0.5,
    )
    assert source.data.hflip is False
    assert load_saved(recorded).data.hflip is False
    assert load_saved(recorded, ["data.hflip=true"]).data.hflip is True
    assert load([*ARGS, "run_dir=other"])[0].data.hflip is True, "a new run has the new default"
    assert load([*ARGS, "run_dir=other", "resume=run"])[0].data.hflip is False
    shutil.copytree(recorded, "moved", symlinks=True)
    assert restore_model(Path("moved")).config.data.hflip is False
    assert train.main([*ARGS, "stages.full.epochs=0"]) == 0
    assert train.main([*ARGS, "stages.full.epochs=0", "data.hflip=true"]) == 2
    assert "data.hflip: was false, now true" in capsys.readouterr().err


def test_a_new_key_is_part_of_the_name_of_a_run_only_when_it_is_set(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "NEW_KEYS", changes.NEW_KEYS | {"data.hflip": True})
    as_before, otherwise = (run_name(load([*ARGS, f"data.hflip={value}"])[0]) for value in ("true", "false"))
    assert as_before != otherwise
    monkeypatch.setattr(changes, "NEW_KEYS", changes.NEW_KEYS | {"data.hflip": False})
    assert as_before == run_name(load([*ARGS, "data.hflip=false"])[0]), "then the key is not in the hash"
