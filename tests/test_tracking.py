"""metrics.jsonl always, Weights & Biases when it pleases."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distil_tl.log import logger
from distil_tl.tracking import Tracker, TrackingConfig, WandbConfig


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "stage": "head", "split": "train", "loss": 0.5, **more}


def tracker(run_dir: Path, mode: str = "disabled", *, after_step: int = 0, **more: Any) -> Tracker:
    settings = TrackingConfig(wandb=WandbConfig(mode=mode, **more))
    return Tracker(run_dir, settings, {"seed": 1}, after_step=after_step)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[int]:
    return [entry["step"] for entry in lines(run_dir)]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    return caplog


# metrics.jsonl


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    record = tracker(tmp_path)
    began = time.time()
    record.log(line(1))
    (entry,) = lines(tmp_path)
    assert began - 1 < entry.pop("time") < time.time() + 1
    assert entry == line(1)
    record.log(line(2, split="val"))
    assert steps(tmp_path) == [1, 2]
    record.close({})


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path):
    record = tracker(tmp_path)
    record.log(line(1, loss=float("nan"), lr=float("inf"), top1=0.5))
    record.close({})
    (entry,) = lines(tmp_path)
    assert (entry["loss"], entry["lr"], entry["top1"]) == (None, None, 0.5)


def test_going_on_takes_back_what_came_after_the_checkpoint(tmp_path: Path):
    record = tracker(tmp_path)
    for step in (10, 20, 20, 30, 40):
        record.log(line(step))
    record.close({})
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close({})
    assert steps(tmp_path) == [10, 20, 20, 21]


def test_a_fresh_start_takes_back_everything(tmp_path: Path):
    tracker(tmp_path).log(line(1))
    tracker(tmp_path).close({})
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    "cut",
    [
        "",
        "{",
        '{"step": 1',
        '{"step": 15, "epoch": 0, "loss": 0.',
        '{"epoch": 0}',
        "\0\0\0",
        "12",
        '{"step": null}',
        "\xff",
    ],
)
def test_a_last_line_that_was_cut_off_goes(tmp_path: Path, cut: str):
    record = tracker(tmp_path)
    record.log(line(10))
    record.close({})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(cut.encode("latin-1"))
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close({})
    assert steps(tmp_path) == [10, 21]


def test_a_last_line_that_lacks_only_its_newline_stays_a_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(10)))
    record = tracker(tmp_path, after_step=20)
    record.log(line(21))
    record.close({})
    assert steps(tmp_path) == [10, 21]


# Weights & Biases


class FakeRun:
    def __init__(self, fail_in: str = "") -> None:
        self.fail_in = fail_in
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fail_in == "log":
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        if self.fail_in == "finish":
            raise ConnectionError("no route to host")
        self.exit_code = exit_code


class FakeWandb(ModuleType):
    """Stands in for the module; remembers what `init` was given."""

    def __init__(self, fail_in: str = "") -> None:
        super().__init__("wandb")
        self.fail_in = fail_in
        self.run = FakeRun(fail_in)
        self.calls: list[dict[str, Any]] = []

    def init(self, **options: Any) -> FakeRun:
        if self.fail_in == "init":
            raise RuntimeError("api_key not configured")
        self.calls.append(options)
        return self.run


def install(monkeypatch: pytest.MonkeyPatch, fail_in: str = "") -> FakeWandb:
    fake = FakeWandb(fail_in)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_disabled_never_touches_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = install(monkeypatch, "init")
    tracker(tmp_path).close({})
    assert fake.calls == []
    assert not (tmp_path / "wandb-id").exists()


def test_wandb_mirrors_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = install(monkeypatch)
    record = tracker(tmp_path, "online", project="flowers", tags=["a"])
    record.log(line(3, epoch=1, lr=0.1, note="text"))
    record.log(line(3, epoch=1, split="val", top1=0.9))
    record.close({"status": "completed", "best": {"top1": 0.9}, "final": {"top1": 0.8}, "test": None}, exit_code=3)

    (options,) = fake.calls
    assert options["config"] == {"seed": 1}
    assert (options["project"], options["tags"], options["name"]) == ("flowers", ["a"], tmp_path.name)
    assert (options["mode"], options["resume"], options["dir"]) == ("online", "allow", tmp_path)
    assert fake.run.logged == [
        (3, {"train/loss": 0.5, "train/lr": 0.1, "epoch": 1, "stage": "head"}),
        (3, {"val/loss": 0.5, "val/top1": 0.9, "epoch": 1, "stage": "head"}),
    ]
    assert fake.run.summary == {"best/top1": 0.9, "final/top1": 0.8}
    assert fake.run.exit_code == 3


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = install(monkeypatch)
    for _ in range(2):
        tracker(tmp_path, "online").close({})
    first, second = fake.calls
    assert first["id"] == second["id"] == (tmp_path / "wandb-id").read_text()
    (tmp_path / "other").mkdir()
    tracker(tmp_path / "other", "online").close({})
    assert fake.calls[2]["id"] != first["id"]


@pytest.mark.parametrize("fail_in", ["import", "init", "log", "finish"])
def test_whatever_wandb_does_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture, fail_in: str
):
    if fail_in == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        install(monkeypatch, fail_in)
    record = tracker(tmp_path, "online")
    record.log(line(1))
    record.log(line(2))
    record.close({"best": {"top1": 0.9}})
    assert steps(tmp_path) == [1, 2]
    assert len(warnings.records) == 1  # said once, not at every line
    assert "Weights & Biases" in warnings.records[0].getMessage()


def test_wandb_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture):
    pytest.importorskip("wandb")
    for name, value in {
        "WANDB_SILENT": "true",
        "WANDB_CACHE_DIR": str(tmp_path),
        "WANDB_CONFIG_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    record = tracker(tmp_path, "offline")
    record.log(line(1))
    record.close({"best": {"top1": 0.9}})
    assert not warnings.records
    run_id = (tmp_path / "wandb-id").read_text()
    assert list(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert steps(tmp_path) == [1]


def test_problems():
    assert TrackingConfig().problems() == []
    assert TrackingConfig(log_every=0).problems() == ["tracking.log_every must be at least 1"]
    (problem,) = TrackingConfig(wandb=WandbConfig(mode="on")).problems()
    assert problem.startswith("tracking.wandb.mode is 'on'")
