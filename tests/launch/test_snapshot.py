"""Snapshots of the code: complete, never changed, and safe against edits and other submissions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distil_tl.rundir import directory as rundir
from launch import snapshot, submit, sweep
from tests.helpers.fake_slurm import FakeSlurm, fake_training
from tests.helpers.submissions import PLAIN


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code to take snapshots of."""
    for package in snapshot.PACKAGES:
        (tmp_path / "source" / package / "__pycache__").mkdir(parents=True)
        (tmp_path / "source" / package / "__pycache__/a.cpython-311.pyc").write_bytes(b"old")
        (tmp_path / "source" / package / "a.py").write_text(f"# {package}")
    (tmp_path / "source/distil_tl/rundir").mkdir()
    shutil.copy(rundir.__file__, tmp_path / "source/distil_tl/rundir/directory.py")
    (tmp_path / "source/launch/page.html").write_text("<p>")
    monkeypatch.setattr(snapshot, "_source_root", lambda: tmp_path / "source")
    monkeypatch.setattr(rundir, "git_state", lambda: {"commit": "c0ffee", "dirty": True})
    return tmp_path / "source"


def test_a_snapshot_is_the_code_without_caches_and_knows_its_commit(source: Path, tmp_path: Path) -> None:
    code = snapshot.take_snapshot(tmp_path / "run")
    assert code.parent == tmp_path / "run/code"
    assert content(code).keys() == {
        "distil_tl/a.py", "distil_tl/rundir/directory.py", "distil_tl/snapshot.json", "launch/a.py", "launch/page.html"
    }  # fmt: skip
    assert (code / "launch/a.py").read_text() == "# launch"
    spec = importlib.util.spec_from_file_location("copied", code / "distil_tl/rundir/directory.py")
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    sys.modules["copied"] = copied  # dataclasses look there
    try:
        spec.loader.exec_module(copied)
    finally:
        del sys.modules["copied"]
    assert copied.git_state() == {"commit": "c0ffee", "dirty": True}


def test_a_snapshot_never_changes(source: Path, tmp_path: Path) -> None:
    """Waiting jobs run it, and another submission must not change it."""
    first = snapshot.take_snapshot(tmp_path / "run")
    (first / "mark").touch()
    before = content(first)
    assert snapshot.take_snapshot(tmp_path / "run") == first
    (source / "launch/a.py").write_text("# edited")
    second = snapshot.take_snapshot(tmp_path / "run")
    assert second != first
    assert content(first) == before
    assert (second / "launch/a.py").read_text() == "# edited"
    (source / "launch/a.py").rename(source / "launch/b.py")
    assert snapshot.snapshot_path(tmp_path / "run") not in (first, second)


@pytest.mark.parametrize("command", [submit.main, sweep.main])
def test_an_edit_during_a_submission_is_not_in_the_snapshot(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], int]
) -> None:
    """The folder keeps the name that the job was given, and contains no part of the edit."""
    edited = fake_training(tmp_path / "source", "return 0") / "distil_tl/train.py"
    before, read = edited.read_bytes(), Path.read_bytes

    def read_and_edit(path: Path) -> bytes:
        content = read(path)
        if path == edited:
            path.write_bytes(content + b"# edited\n")
        return content

    monkeypatch.setattr(snapshot, "_source_root", lambda: tmp_path / "source")
    monkeypatch.setattr(Path, "read_bytes", read_and_edit)
    Path("seeds.yaml").write_text("seeds: [0, 1]")
    args = PLAIN if command is submit.main else [arg for arg in PLAIN if not arg.startswith("run_dir")]
    assert command([*args, "--no-test", *(["seeds.yaml"] if command is sweep.main else [])]) == 0
    (code,) = {
        line
        for job in slurm.jobs.values()
        for line in re.findall(r"^cd (.*) \|\| exit 2$", job["script"], re.MULTILINE)
    }
    assert read(Path(code) / "distil_tl/train.py") == before


def test_two_submissions_at_once_share_a_snapshot(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def slower(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        snapshot.take_snapshot(tmp_path / "run")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slower)
    code = snapshot.take_snapshot(tmp_path / "run")
    assert list((tmp_path / "run/code").iterdir()) == [code], "no incomplete copy is left"
    assert len(content(code)) == 5


def test_a_full_disk_leaves_no_part_of_a_snapshot(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            snapshot.take_snapshot(tmp_path / "run")
    assert not list((tmp_path / "run/code").iterdir())
    assert snapshot.take_snapshot(tmp_path / "run").is_dir()
