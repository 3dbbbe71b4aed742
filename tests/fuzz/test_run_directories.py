"""Damaged run directories: any command says what is wrong or does its work, and destroys nothing."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import strategies as st

from distil_tl.rundir.checkpoint import Checkpoints, find_damage
from tests.fuzz.damage import Damage, apply, damages
from tests.fuzz.running import End, explore, fault_of, run_main, snapshot
from tests.helpers.arguments import small_args
from tests.helpers.fake_slurm import instead_of_slurm
from tests.helpers.images import make_folder
from tests.helpers.ranks import train

LONG = pytest.mark.fuzz
MODULES = {
    "train": "distil_tl.train", "evaluate": "distil_tl.evaluate", "report": "distil_tl.report",
    "status": "launch.status", "logs": "launch.logs", "cancel": "launch.cancel", "submit": "launch.submit",
    "sync": "launch.sync", **{name: f"distil_tl.cli.{name}" for name in ("predict", "compare", "export", "extend")},
}  # fmt: skip
COMMANDS = [*MODULES, "train", "train", "evaluate", "status", "report"]
READ_ONLY = ("evaluate", "predict", "compare", "status", "logs", "cancel")


class Runs:
    """A completed and an interrupted run of few steps, and the images of both."""

    def __init__(self, root: Path) -> None:
        self.data = make_folder(root / "shapes", {"": 24})
        self.args = [
            *small_args(self.data), "stages.head.epochs=2", "stages.full.epochs=0", "data.augment=none",
            "checkpoint.keep=3", "tracking.wandb.mode=disabled",
        ]  # fmt: skip
        self.completed, self.interrupted = root / "completed", root / "interrupted"
        assert train([*self.args, f"run_dir={self.completed}"]) == 0
        train_module: Any = importlib.import_module("distil_tl.train")
        step = train_module.optimizer_step
        taken = iter(range(1, 100))

        def optimizer_step(*args: Any) -> None:
            step(*args)
            if next(taken) == 3:
                os.kill(os.getpid(), 15)

        with mock.patch.object(train_module, "optimizer_step", optimizer_step):
            assert train([*self.args, f"run_dir={self.interrupted}"]) == 3
        for run_dir in (self.completed, self.interrupted):
            record = {"job_id": "7", "cluster": "slurm", "slurm_cluster": "fake", "time": "2020-01-01T00:00:00+00:00"}
            (run_dir / "submitted.json").write_text(json.dumps(record))
            (run_dir / "wandb-id").write_text("abcdefgh")

    def arguments(self, command: str, run_dir: Path, out: Path) -> list[str]:
        run = str(run_dir)
        return {
            "train": [*self.args, f"run_dir={run}"],
            "evaluate": [run, "--json", str(out / "out.json")],
            "predict": [run, str(self.data), "-o", str(out / "out.csv"), "--workers=0", "--device=cpu"],
            "compare": [run, str(self.completed), "--device=cpu"],
            "export": [run, "--format=safetensors", "-o", str(out / "exported")],
            "extend": [run, "stages.head.epochs=+1"],
            "submit": [*self.args, f"run_dir={run}", "--dry-run"],
            "sync": [run, "--dry-run"],
        }.get(command, [run])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("examples", [12, pytest.param(1500, marks=LONG)])
def test_a_damaged_run_directory(examples: int, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_slurm(tmp_path, monkeypatch)

    def body(example: tuple[bool, list[Damage], str]) -> tuple[End, str, object]:
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        try:
            return tried(runs, root, *example)
        finally:  # a checkpoint may still be written in the background
            shutil.rmtree(root, ignore_errors=True)

    explore(st.tuples(st.booleans(), damages, st.sampled_from(COMMANDS)), examples, body)


def tried(
    runs: Runs, root: Path, complete: bool, chosen: list[Damage], command: str
) -> tuple[End, str, tuple[str, str, list[str]]]:
    """Damage a copy of a run, and run a command on it. How it ended, its fault, and how to show the example."""
    run_dir, out = root / "run", root / "out"
    shutil.copytree(runs.completed if complete else runs.interrupted, run_dir, symlinks=True)
    out.mkdir()
    shown = [apply(run_dir, damage) for damage in chosen]
    before, images = snapshot(run_dir), snapshot(runs.data, runs.completed)
    valid = valid_checkpoints(run_dir)
    main: Callable[[list[str]], int] = importlib.import_module(MODULES[command]).main
    end = run_main(main, runs.arguments(command, run_dir, out))
    fault = fault_of(end, plain=False)
    if not fault and snapshot(runs.data, runs.completed) != images:
        fault = "images, or another run, were changed"
    changed = [path for path, old in before.items() if snapshot_of(path) != old[2]] if not fault else []
    if changed and (command in READ_ONLY or end.status == 2):
        fault = f"{command}, status {end.status}: changed {changed}"
    newest = max(valid, default=None)
    if not fault and newest is not None and not any(path >= newest for path in valid_checkpoints(run_dir)):
        fault = f"the valid checkpoint {newest} is lost"
    return end, fault, (command, "completed" if complete else "interrupted", shown)


def snapshot_of(path: bytes) -> object:
    """As in `snapshot`, without permissions and identity: what is there; None if nothing is."""
    found = snapshot(Path(os.fsdecode(path)))[path]
    return None if found is None else found[2]


def valid_checkpoints(run_dir: Path) -> list[str]:
    return [path.name for path in Checkpoints(run_dir / "checkpoints").all() if find_damage(path) is None]
