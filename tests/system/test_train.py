"""The whole job on small images: its files, stopping, resuming and refusing."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distil_tl
from distil_tl import train as train_module
from distil_tl.rundir import checkpoint as checkpoint_module
from distil_tl.rundir.checkpoint import Checkpoints
from distil_tl.train import main
from distil_tl.utils.errors import NonFiniteError, UserError
from distil_tl.utils.files import sha256_file
from tests.helpers.arguments import small_args
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import refused, same_result, stopped_train, summary_of


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert run_ranks(2, train, [*small_args(folder), f"run_dir={run_dir}"]) == [0, 0]
    return run_dir


def test_the_files_of_a_run_directory(finished: Path) -> None:
    summary = summary_of(finished)
    assert summary["status"] == "completed"
    assert summary["world_size"] == 2
    assert summary["best"]["stage"] in ("head", "full")
    assert summary["final"]["epoch"] == 2
    assert list(summary["stages"]) == ["head", "full"]
    full = summary["stages"]["full"]
    assert full["epochs"] == 2
    assert full["train_images"] == 2 * 48
    assert full["cached"] is False
    assert full["trainable_parameters"] > summary["stages"]["head"]["trainable_parameters"]
    assert {"seconds", "images_per_second"} <= full.keys()
    assert 0 < full["data_wait_seconds"] < full["train_seconds"]
    assert summary["total_seconds"] > 0
    assert summary["peak_memory_mb"] > 0
    assert json.loads((finished / "classes.json").read_text()) == ["circles", "noise", "stripes"]
    env = json.loads((finished / "env.json").read_text())
    assert env["world_size"] == 2
    assert {"versions", "git", "command", "host", "device", "start_time"} <= env.keys()
    assert (finished / "logs" / "rank-0.log").exists()
    assert (finished / "logs" / "rank-1.log").exists()
    assert "<html" in (finished / "report.html").read_text()
    folder = finished / "checkpoints"
    assert (folder / "last").readlink() == Path("step-00000018")
    assert (folder / "best" / "weights.safetensors").exists()
    assert {p.name for p in (folder / "last").iterdir()} == {
        "weights.safetensors",
        "train_state.pt",
        "state.json",
        "checksums",
        "calibration.json",  # it is the best one, too
    }


def test_metrics_have_every_field_and_rising_steps(finished: Path) -> None:
    every = lines(finished)
    promised = {
        "step", "epoch", "stage", "split", "loss", "top1", "top5", "macro_f1", "lr", "images_per_second",
        "seconds", "samples_seen", "time", "data_wait_seconds",
    }  # fmt: skip
    assert all(promised <= line.keys() for line in every)
    steps = [line["step"] for line in every]
    assert steps == sorted(steps)
    val = lines(finished, split="val")
    assert [(line["stage"], line["epoch"], line["step"]) for line in val] == [
        ("head", 1, 6),
        ("full", 1, 12),
        ("full", 2, 18),
    ]
    assert [line["samples_seen"] for line in val] == [48, 96, 144]


def test_the_same_command_on_a_completed_run_trains_nothing(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert main([*small_args(folder), f"run_dir={finished}"]) == 0
    assert "completed" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_changed_configuration_is_refused_by_name(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small_args(folder), f"run_dir={finished}", "optim.weight_decay=0.5"]) == 2
    assert "optim.weight_decay: was 0.01, now 0.5" in capsys.readouterr().err


def test_never_resuming_does_not_overwrite(finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small_args(folder), f"run_dir={finished}", "resume=never"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_loading_in_one_line(finished: Path, folder: Path) -> None:
    model, transform, classes = distil_tl.load(finished)
    image = next((folder / "val" / "stripes").iterdir())
    logits = model(transform(image)[None])
    assert logits.shape == (1, 3)
    assert classes == ["circles", "noise", "stripes"]
    assert not model.training
    with pytest.raises(UserError, match="has no checkpoint"):
        distil_tl.load(finished, "step-7")


def test_evaluation_agrees_with_loading_by_hand(finished: Path, folder: Path) -> None:
    model, transform, classes = distil_tl.load(finished)
    hits = n = 0
    with torch.no_grad():
        for target, name in enumerate(classes):
            for path in sorted((folder / "val" / name).iterdir()):
                hits += int(model(transform(path)[None]).argmax() == target)
                n += 1
    assert hits / n == summary_of(finished)["best"]["top1"]


# Stop and resume.


@pytest.mark.parametrize(
    ("step", "number"),
    [(3, signal.SIGTERM), (6, signal.SIGINT), (14, signal.SIGUSR2)],
    ids=["head", "boundary", "full"],
)
def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_exactly(
    finished: Path, small: list[str], tmp_path: Path, step: int, number: int
) -> None:
    run_dir = tmp_path / "run"
    args = [*small, f"run_dir={run_dir}"]
    assert run_ranks(2, stopped_train, args, step, 1, number) == [3, 3]
    assert summary_of(run_dir)["status"] == "preempted"
    assert step <= lines(run_dir)[-1]["step"] <= step + 1
    assert run_ranks(2, train, args) == [0, 0]
    same_result(run_dir, finished)


def test_on_four_ranks_too_where_the_order_of_a_sum_matters(small: list[str], tmp_path: Path) -> None:
    """Gradients are added in the order of DDP's buckets, which DDP fixes after a first step."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    args = [*small, "stages.full.unfreeze=all", "stages.full.epochs=1"]
    assert run_ranks(4, train, [*args, f"run_dir={whole}"]) == [0] * 4
    assert run_ranks(4, stopped_train, [*args, f"run_dir={again}"], 9, 1, signal.SIGTERM) == [3] * 4
    assert run_ranks(4, train, [*args, f"run_dir={again}"]) == [0] * 4
    same_result(again, whole)


def test_a_killed_run_resumes_from_its_last_epoch(finished: Path, small: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = [*small, f"run_dir={run_dir}"]
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, stopped_train, args, 15, 0, signal.SIGKILL)
    assert run_ranks(2, train, args) == [0, 0]
    same_result(run_dir, finished)


def test_a_damaged_newest_checkpoint_is_skipped(
    finished: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    weights = run_dir / "checkpoints" / "last" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main([*small, f"run_dir={run_dir}"]) == 0
    said = capsys.readouterr().out
    assert "step-00000018 is damaged" in said
    assert "resuming from step 12" in said
    one, two = (load_file(path / "checkpoints" / "last" / "weights.safetensors") for path in (run_dir, finished))
    for key, value in one.items():  # one rank now, two before: equal to rounding
        torch.testing.assert_close(value, two[key], rtol=1e-3, atol=1e-4)


def test_a_run_can_resume_from_another_run(finished: Path, small: list[str], tmp_path: Path) -> None:
    start = finished / "checkpoints" / "step-00000012"
    assert main([*small, f"run_dir={tmp_path}/run", f"resume={start}"]) == 0
    assert summary_of(tmp_path / "run")["status"] == "completed"


def test_divergence_stops_with_the_weights_before_it(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    args = [*small, f"run_dir={run_dir}", "stages.full.lr=1e36", "stages.full.unfreeze=all", "optim.clip_norm=null"]
    assert main(args) == 1
    assert "not finite" in capsys.readouterr().err
    assert summary_of(run_dir)["status"] == "failed"
    weights = load_file(run_dir / "checkpoints" / "last" / "weights.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_failed_save_is_reported_though_the_run_fails_for_another_reason(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter(range(1000))

    def check_finite(*args: object) -> None:
        if next(looks) == 3:
            raise NonFiniteError("the loss is not finite")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train_module, "check_finite", check_finite)
    monkeypatch.setattr(checkpoint_module, "save_file", full)
    assert main([*small, f"run_dir={tmp_path}/run", "checkpoint.every_steps=2"]) == 1
    said = capsys.readouterr()
    assert "can't write the checkpoint" in said.out
    assert "the loss is not finite" in said.err
    assert summary_of(tmp_path / "run")["status"] == "failed"


def test_a_lost_best_checkpoint_is_reported(
    finished: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    (run_dir / "summary.json").unlink()
    before, newest = (Checkpoints(run_dir / "checkpoints").path(step) for step in (12, 18))
    state, sums = newest / "state.json", newest / "checksums"
    digest, content = sha256_file(state), json.loads(state.read_text())
    content["run"]["best"]["step"] = 12
    state.write_text(json.dumps(content))
    sums.write_text(sums.read_text().replace(digest, sha256_file(state)))
    (before / "weights.safetensors").write_bytes(b"")
    assert main([*small, f"run_dir={run_dir}"]) == 0
    assert (
        "the best checkpoint, of step 12, is missing or damaged; the best result is determined again"
        in capsys.readouterr().out
    )
    assert distil_tl.load(run_dir).classes == ["circles", "noise", "stripes"], "`best` is a valid checkpoint"


# Refusals; more in test_refusals.py.


def test_changed_images_are_refused_on_resume(
    finished: Path, small: list[str], tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, root)
    shutil.copytree(finished, run_dir, symlinks=True)
    (run_dir / "summary.json").unlink()
    next((root / "train" / "noise").iterdir()).unlink()
    message = refused([*small, f"data.root={root}", f"run_dir={run_dir}"], capsys)
    assert str(root / "train") in message
    assert "differ from those" in message


# Regressions.


def test_a_stage_added_to_a_completed_run_is_trained(small: list[str], tmp_path: Path) -> None:
    args = [*small, f"run_dir={tmp_path}/lr=0.1"]
    assert main([*args, "stages.full.epochs=0"]) == 0
    assert list(summary_of(tmp_path / "lr=0.1")["stages"]) == ["head"]
    assert main([*args, "stages.full.epochs=1"]) == 0
    assert summary_of(tmp_path / "lr=0.1")["stages"]["full"]["epochs"] == 1
    assert distil_tl.load(tmp_path / "lr=0.1").classes == ["circles", "noise", "stripes"], "a path with = in it"


def test_a_run_can_resume_from_a_completed_run_of_another_directory(
    finished: Path, small: list[str], tmp_path: Path
) -> None:
    assert main([*small, f"run_dir={tmp_path}/run", f"resume={finished}"]) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "completed"
    assert summary["best"]["top1"] == summary_of(finished)["final"]["top1"], "the only checkpoint"


def test_a_size_that_a_later_stage_cannot_take_is_refused_at_once(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*small, "model.name=timm/vit_tiny_patch16_224", "stages.full.image_size=40", f"run_dir={tmp_path}/run"]
    assert "multiple of 16" in refused(args, capsys)
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_read_is_never_skipped(
    small: list[str], tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader: Any = importlib.import_module("distil_tl.data.loader")
    original = loader.decode

    def decode(path: Path, *how: Any, **more: Any) -> torch.Tensor:
        if path.name == "0001.png" and "train" in str(path):
            raise PermissionError(13, "Permission denied")
        image: torch.Tensor = original(path, *how, **more)
        return image

    monkeypatch.setattr(loader, "decode", decode)
    message = refused([*small, f"run_dir={tmp_path}/run", "data.on_bad_image=skip", "data.workers=1"], capsys)
    assert (
        "0001.png of class noise: the file can't be read: Permission denied. Unreadable files are never skipped"
        in message
    )
    assert "data.on_bad_image=skip" not in message, "it is set already, so the message does not suggest it"
