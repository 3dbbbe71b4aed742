"""Refusals before training: one message that names the problem and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from distil_tl import train as train_module
from distil_tl.rundir import lock
from distil_tl.train import main
from tests.helpers.images import make_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import refusal, refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.root=/nowhere/at/all", "data.root=/nowhere/at/all is not a folder"),
        ("model.name=resnet81", "did you mean `resnet18`"),
        ("stages.full.unfreeze=[layer5]", "layer5"),
        ("stages.full.unfreeze=99", "groups"),
        ("data.global_batch_size=64", "has 52 images, fewer than one global batch"),
        ("model.weights=/nowhere.pth", "there is no file /nowhere.pth"),
        ("precision=fp8", "precision is 'fp8'"),
        ("resume=/nowhere", "resume=/nowhere does not exist"),
    ],
)
def test_bad_input_is_named(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert message in refused([*small, f"run_dir={tmp_path}/run", change], capsys)
    assert not (tmp_path / "run").exists(), "refused before anything was written"


def test_stages_that_do_not_fit_the_model_are_named_together_before_any_image_is_looked_at(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("open_splits", "download_weights"):
        monkeypatch.setattr(train_module, work, None)
    message = refused(
        [*small, f"run_dir={tmp_path}/run", "stages.head.unfreeze=99", "stages.full.unfreeze=[layer5]"], capsys
    )
    assert "2 problems:" in message
    assert "stages.head.unfreeze=99, but the model has" in message
    assert "stages.full.unfreeze names layer5" in message


@pytest.mark.parametrize("part", ["", "checkpoints", "logs"])
def test_a_run_directory_that_cannot_be_written_to_is_refused_before_any_work(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    closed = tmp_path / "run" / part
    closed.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))  # root may write all
    monkeypatch.setattr(train_module, "open_splits", None)
    message = refused([*small, f"run_dir={tmp_path}/run"], capsys)
    assert f"run_dir={tmp_path}/run: {closed} can't be written to (its permissions, " in message


def test_a_run_directory_below_a_file_is_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for where in ("file", "file/run"):
        message = refused([*small, f"run_dir={tmp_path}/{where}"], capsys)
        assert f"run_dir={tmp_path}/{where}: {tmp_path}/file is a file; choose another run_dir" in message


def test_a_run_directory_that_cannot_be_made_is_refused_before_any_work(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    message = refused([*small, f"run_dir={tmp_path}/dangling/run"], capsys)
    assert f"{tmp_path}/dangling is a broken symbolic link; choose another run_dir" in message
    assert "can't write in /proc/self/fd" in refused([*small, "run_dir=/proc/self/fd/run"], capsys)


def test_a_run_directory_that_cannot_be_opened_is_reported_in_a_sentence(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "write_json", full)
    assert main([*small, f"run_dir={tmp_path}/run"]) == 1
    assert f"can't write {tmp_path}/run: No space left on device" in capsys.readouterr().err


def test_an_empty_class_and_a_class_that_train_lacks_are_named(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "data", {"train": 12, "val": 6})
    (root / "train" / "triangles").mkdir()
    args = [*small, f"data.root={root}", f"run_dir={tmp_path}/run"]
    assert "triangles" in refused(args, capsys)
    (root / "train" / "triangles").rmdir()
    make_folder(root, {"val": 1}, classes=("stripe",))
    message = refused(args, capsys)
    assert "stripe" in message
    assert "stripes" in message


def test_bad_input_is_reported_once_by_two_ranks(small: list[str], tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    (root / "train" / "empty").mkdir()
    found = run_ranks(2, refusal, [*small, f"data.root={root}", f"run_dir={tmp_path}/run"])
    assert [status for status, _ in found] == [2, 2]
    assert "empty" in found[0][1]
    assert found[1][1] == ""


def test_a_damaged_image_is_named_with_its_class(
    small: list[str], tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    image = next((root / "train" / "noise").iterdir())
    image.write_bytes(image.read_bytes()[:60])
    for workers in ("data.workers=0", "data.workers=1"):
        message = refused([*small, f"data.root={root}", f"run_dir={tmp_path}/run", workers], capsys)
        assert str(image) in message
        assert "class noise" in message
