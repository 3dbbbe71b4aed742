"""`distil-tl extend`: a run goes on in a new stage, which is recorded."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from distil_tl import train as train_module
from distil_tl.cli.extend import extended, main
from distil_tl.training.step import optimizer_step
from tests.helpers.arguments import head_args
from tests.helpers.ranks import train
from tests.helpers.runs import summary_of


def test_a_completed_run_is_trained_further_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(head_args(folder, run_dir, "stages.full.epochs=0", "stages.head.epochs=1")) == 0
    before = summary_of(run_dir)["final"]["step"]
    assert main([str(run_dir), "stages.head.epochs=+2", "stages.head.lr=0.003", "data.workers=0"]) == 0
    assert main([str(run_dir), "stages.head_2.epochs=+1"]) == 0
    stages = yaml.safe_load((run_dir / "config.yaml").read_text())["stages"]
    assert [(name, stage["epochs"]) for name, stage in stages.items() if stage["epochs"]] == [
        ("head", 1),
        ("head_2", 2),
        ("head_2_2", 1),
    ]
    assert [stages[name]["lr"] for name in ("head_2", "head_2_2")] == [0.003, 0.003]
    summary = summary_of(run_dir)
    assert (summary["status"], summary["final"]["step"]) == ("completed", 4 * before)
    assert main([str(run_dir), "stages.fulll.epochs=+1"]) == 2
    assert "has no stage fulll, did you mean `full`?" in capsys.readouterr().err


def test_the_configuration_can_be_written_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("stages: {full: {unfreeze: all, epochs: 4, search: {lr: [1]}}}\nseed: 3\n")
    out = tmp_path / "more.yaml"
    assert main([str(tmp_path), "stages.full.epochs=+3", "data.root=my images", "--config", str(out)]) == 0
    assert f"distil-tl submit {out} 'data.root=my images'" in capsys.readouterr().out
    written = yaml.safe_load(out.read_text())
    assert written["stages"]["full_2"] == {"unfreeze": "all", "epochs": 3, "search": {}}
    assert (written["seed"], written["run_dir"]) == (3, str(tmp_path))
    odd = tmp_path / "caf\udce9\n.yaml"  # a name that is not UTF-8
    assert main([str(tmp_path), "stages.full.epochs=+3", "--config", str(odd)]) == 0
    assert "caf\\udce9\\n.yaml: submit it with" in capsys.readouterr().out
    assert odd.exists()


def test_the_same_command_resumes_an_extension_that_was_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    assert train(head_args(folder, run_dir, "stages.full.epochs=0", "stages.head.epochs=1")) == 0
    before = summary_of(run_dir)["final"]["step"]
    command = [str(run_dir), "stages.head.epochs=+2", "checkpoint.every_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "optimizer_step", step_and_signal)
        assert main(command) == 3
    assert main(command) == 0
    assert summary_of(run_dir)["final"]["step"] == 3 * before
    assert main(command) == 0, "now it is complete, so it is trained further"
    assert summary_of(run_dir)["final"]["step"] == 5 * before


def test_an_extension_that_was_stopped_before_its_interpolation_is_resumed(tmp_path: Path) -> None:
    stage = {"unfreeze": "all", "epochs": 2, "wise_ft": True}
    (tmp_path / "config.yaml").write_text(json.dumps({"stages": {"full": stage, "full_2": {**stage, "search": {}}}}))
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    for result, expected in ((None, ["full", "full_2"]), ({"alpha": 1.0}, ["full", "full_2", "full_3"])):
        state = {"run": {"stages": {"full_2": {"epochs": 2, "wise_ft": result}}}}
        (tmp_path / "checkpoints" / "last" / "state.json").write_text(json.dumps(state))
        assert list(extended(tmp_path, ["stages.full.epochs=+2"])[0]["stages"]) == expected


def step_and_signal(*args: Any) -> None:
    optimizer_step(*args)
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_search_found_is_continued_with(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "stages: {head: {unfreeze: head, epochs: 4, lr: 1, search: {lr: [1, 2]}}}\noptim: {weight_decay: 0.1}\n"
    )
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    for decay, search in ((0.1, {}), (0.5, {"weight_decay": [0.5]})):
        record = {"epochs": 4, "search": {"lr": 2.0, "weight_decay": decay}}
        state = {"run": {"stages": {"head": record}}}
        (tmp_path / "checkpoints" / "last" / "state.json").write_text(json.dumps(state))
        added = extended(tmp_path, ["stages.head.epochs=+2"])[0]["stages"]["head_2"]
        assert (added["lr"], added["search"]) == (2.0, search)
        assert extended(tmp_path, ["stages.head.epochs=+2", "stages.head.lr=7"])[0]["stages"]["head_2"]["lr"] == 7


def test_a_learning_rate_that_was_auto_is_continued_with(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stages: {full: {unfreeze: all, epochs: 4, lr: auto, layer_decay: auto}}\n")
    assert extended(tmp_path, ["stages.full.epochs=+2"])[0]["stages"]["full_2"]["lr"] == "auto", "nothing is known"
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    state = {"run": {"stages": {"full": {"epochs": 4, "lr": 7e-4, "layer_decay": 0.95}}}}
    (tmp_path / "checkpoints" / "last" / "state.json").write_text(json.dumps(state))
    for more, expected in (([], 7e-4), (["stages.full.lr=2e-4"], 2e-4), (["stages.full.lr=auto"], "auto")):
        stages = extended(tmp_path, ["stages.full.epochs=+2", *more])[0]["stages"]
        assert (stages["full"]["lr"], stages["full_2"]["lr"]) == ("auto", expected)
        assert (stages["full"]["layer_decay"], stages["full_2"]["layer_decay"]) == ("auto", 0.95)


@pytest.mark.parametrize(
    "arguments",
    [
        ["stages.full.epochs=+1", "stages.full.epochs=2"],
        ["stages.full.epochs=7"],
        ["stages.full.epochs=+0"],
        ["seed=1"],
    ],
)
def test_the_number_of_further_epochs_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text("stages: {full: {unfreeze: all}}\n")
    assert main([str(tmp_path), *arguments]) == 2
    assert "as in stages.full.epochs=+3" in capsys.readouterr().err
    assert main([str(tmp_path), "stages.full.epochs=+1", "run_dir=elsewhere"]) == 2
    assert "run_dir=elsewhere: the run to extend is RUN_DIR" in capsys.readouterr().err
    assert main([str(tmp_path), "stages.full.epochs=+1", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "stages.full.epochs=+1"]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_the_configuration_replaces_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("stages: {full: {unfreeze: all, epochs: 4}}\n")
    for name in ("mine.yaml", "classes.json"):
        (tmp_path / name).write_text("mine")
        assert main([str(tmp_path), "stages.full.epochs=+3", "--config", str(tmp_path / name)]) == 2
        assert "is no earlier output" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
