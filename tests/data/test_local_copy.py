"""Copies of images on a node's own disk: complete or absent, and only in their own folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest

from distil_tl.config import load
from distil_tl.data import local_copy, local_folder
from distil_tl.data.local_copy import stage_folder
from distil_tl.data.local_folder import FolderWriter
from distil_tl.data.splits import open_splits
from distil_tl.utils.log import setup_console
from tests.helpers.arguments import small_args
from tests.helpers.chaos import small_disk
from tests.helpers.ranks import forkserver, run_ranks
from tests.helpers.staging import ALONE, content, copied, copy_alone, counted_copy, folders_of, indexes, interrupted

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_the_digits_can_be_staged_too(near: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    args = [*small_args(tmp_path)[1:], "stages.head.epochs=0", "stages.full.epochs=0", f"data.stage_to={near}"]
    config = load(args)[0]
    splits = open_splits(ALONE, config.data)
    found = stage_folder(ALONE, str(near), {"train": splits.train, "val": splits.val})
    assert found is not None
    assert found.parents[1].name.startswith("digits-v1-")
    assert len(content(found)) == 1797


def test_links_are_followed(data: Path, near: Path, tmp_path: Path) -> None:
    (data / "train" / "noise").rename(tmp_path / "elsewhere")
    (data / "train" / "noise").symlink_to(tmp_path / "elsewhere")
    image = next((data / "val" / "noise").iterdir())
    image.rename(tmp_path / "image.png")
    image.symlink_to(tmp_path / "image.png")
    here = copied(data, near)
    assert not [path for path in here.rglob("*") if path.is_symlink()]
    assert indexes(here)["train"].fingerprint == indexes(data)["train"].fingerprint


# Complete copies.


def test_a_second_run_uses_the_copy_and_replaces_an_incomplete_one(
    data: Path, near: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here = copied(data, near)
    ready = here.parent
    files = [path for path in here.rglob("*") if path.is_file()]
    note = json.loads((ready / "complete.json").read_text())
    assert (note["source"], note["files"]) == (str(data), 83)
    assert (note["bytes"], len(note["sample"])) == (sum(path.stat().st_size for path in files), 83)

    def again() -> str:
        capsys.readouterr()
        setup_console(is_main=True)
        assert copied(data, near) == here
        assert content(here) == content(data)
        return capsys.readouterr().out

    before = [path.stat().st_ino for path in files]
    assert f"images: using the existing copy in {here}" in again()
    assert [path.stat().st_ino for path in files] == before

    files[0].unlink()
    assert f"images: the copy in {here} is no longer complete\nimages: 83 files, " in again()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert "no longer complete" in again()
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"?")
    assert "no longer complete" in again()
    (ready / "complete.json").write_text("{}")
    assert "no longer complete" in again()
    (ready / "complete.json").write_text(json.dumps({**note, "boot": "an earlier boot"}))
    assert "no longer complete" in again()
    assert "using the existing copy" in again()
    assert sorted(path.name for path in ready.parent.iterdir()) == ["lock", "ready"]


def test_only_a_sample_of_large_data_is_verified(data: Path, near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(path.stat().st_size for path in data.rglob("*.png"))
    monkeypatch.setattr(local_folder, "SAMPLE_BYTES", total // 4)
    here = copied(data, near)
    sample = json.loads((here.parent / "complete.json").read_text())["sample"]
    assert 5 < len(sample) < 40
    assert sample == {name: zlib.crc32((data / name).read_bytes()) for name in sample}


def test_a_copy_that_reads_back_differently_is_not_used(
    data: Path, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FolderWriter.write

    def garbles(writer: Any, reader: Any, name: str, size: int) -> None:
        original(writer, reader, name, size)
        if writer.files == 40:
            (writer.images / name).write_bytes(bytes(size))

    monkeypatch.setattr(FolderWriter, "write", garbles)
    assert stage_folder(ALONE, str(near), indexes(data)) is None
    assert [path.name for path in near.rglob("*") if path.is_file()] == ["lock"]


def test_a_killed_copy_is_made_again_from_the_beginning(folder: Path, near: Path) -> None:
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, interrupted, copy_alone, (str(folder), str(near)), signal.SIGKILL, 20)
    (place,) = folders_of(near)
    assert sorted(path.name for path in place.iterdir()) == ["lock", "partial"]
    assert 18 < len(content(place / "partial" / "images")) < 60
    assert content(copied(folder, near)) == content(folder)
    assert sorted(path.name for path in place.iterdir()) == ["lock", "ready"]


def test_changed_data_get_a_copy_of_their_own(data: Path, near: Path) -> None:
    first = copied(data, near)
    image = next((data / "train" / "noise").iterdir())
    blank = bytes(image.stat().st_size)
    image.write_bytes(blank)  # of the same size
    second = copied(data, near)
    assert first != second
    assert content(first / "train")[f"noise/{image.name}"] != blank
    assert content(second) == content(data)
    (data / "val" / "noise" / "new.png").write_bytes(b"new")
    assert copied(data, near) not in (first, second)
    assert copied(data, near).parents[2] == near


def test_jobs_on_one_node_copy_once(folder: Path, near: Path, tmp_path: Path) -> None:
    arguments = (str(folder), str(near), str(tmp_path / "log"))
    jobs = [forkserver().Process(target=counted_copy, args=arguments) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len((tmp_path / "log").read_bytes()) == 83


def test_a_job_waits_for_the_copy_of_another_job(folder: Path, near: Path) -> None:
    here = copied(folder, near)
    found: list[Path] = []
    with (here.parents[1] / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: found.append(copied(folder, near)))
        waiting.start()
        waiting.join(0.5)
        assert found == []
    waiting.join(20)
    assert found == [here]


# Without a copy.


def free(disk: Path) -> int:
    space = os.statvfs(disk)
    return space.f_bavail * space.f_frsize


def why_not(near: Path | str, data: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The reason in the warning that images are read from the source."""
    setup_console(is_main=True)
    assert stage_folder(ALONE, str(near), indexes(data)) is None
    warning = capsys.readouterr().out.splitlines()[-1]
    start, end = "data.stage_to: ", f"; reading the images from {data}"
    assert warning.startswith(start)
    assert warning.endswith(end)
    return warning[len(start) : -len(end)]


@AS_ROOT
@pytest.mark.parametrize("seen", ["beforehand", "on the way"])
def test_images_that_do_not_fit_are_read_from_the_source(
    folder: Path, near: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    """Other programs may write to the disk during the copy, and still have space afterwards."""
    with small_disk(near):
        if not near.is_mount():
            pytest.skip("can't mount a file system")
        (near / "others").write_bytes(b"x" * (free(near) - 100_000))
        left = free(near)
        if seen == "on the way":
            monkeypatch.setattr(local_copy, "require_free_space", lambda *args: None)
        why = why_not(near, folder, capsys)
        if seen == "on the way":
            assert re.fullmatch(rf"{near} was full after 0\.[01] MB", why)
        else:  # each of the 83 files takes up whole blocks
            blocks = sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*.png"))
            assert why == f"{blocks * 4096 / 1e6:.1f} MB do not fit in {near}, where 0.1 MB are free"
        assert sorted(path.name for path in near.rglob("*") if path.is_file()) == ["lock", "others"]
        assert left - 3 * 4096 <= free(near) <= left


def test_a_variable_that_is_not_set(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    why = why_not("$NO_SUCH_DISK/${EMPTY}", folder, capsys)
    assert why == "NO_SUCH_DISK, EMPTY are not set in '$NO_SUCH_DISK/${EMPTY}'"


@pytest.mark.parametrize("obstacle", ["file", "within", "link"])
def test_an_unusable_location(
    data: Path, near: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], obstacle: str
) -> None:
    if obstacle == "file":
        near.write_text("")
        assert why_not(near, data, capsys).startswith(f"Not a directory: {near}/flowers-")
    elif obstacle == "within":
        assert why_not(data / "near", data, capsys) == f"{data}/near is inside {data}"
        assert sorted(path.name for path in data.iterdir()) == ["train", "val"]
    else:
        place = copied(data, near).parents[1]
        shutil.rmtree(place)
        (tmp_path / "others").mkdir()
        place.symlink_to(tmp_path / "others")
        assert why_not(near, data, capsys) == f"{place} belongs to another user"
        assert list((tmp_path / "others").iterdir()) == []


@AS_ROOT
def test_a_folder_that_another_user_put_there(folder: Path, near: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = copied(folder, near).parents[1]
    assert place.stat().st_mode & 0o777 == 0o700, "the source may be closed to others, too"
    os.chown(place, 12345, -1)
    assert why_not(near, folder, capsys) == f"{place} belongs to another user"


@pytest.mark.parametrize("fault", ["it changes", "it goes", "it can't be read"])
def test_errors_of_the_source_are_left_to_training(
    data: Path, near: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training then names the image in its error."""
    found = indexes(data)
    image = next((data / "train" / "noise").iterdir())
    if fault == "it changes":
        image.write_bytes(b"new")
    elif fault == "it goes":
        image.unlink()
    else:
        original = FolderWriter.write

        def fails(writer: Any, reader: Any, *args: Any) -> None:
            if reader.name == str(image):
                raise OSError(errno.EIO, "Input/output error", reader.name)
            original(writer, reader, *args)

        monkeypatch.setattr(FolderWriter, "write", fails)
    assert stage_folder(ALONE, str(near), found) is None
    assert [path.name for path in near.rglob("*") if path.is_file()] == ["lock"]


def test_only_the_images_of_the_splits_are_copied(data: Path, near: Path) -> None:
    """Neither other files in class folders nor other folders."""
    (data / "raw").mkdir()
    (data / "raw" / "huge.bin").write_bytes(b"x")
    (data / "train" / "noise" / "notes.txt").write_bytes(b"x")
    shutil.copy(next((data / "val" / "noise").iterdir()), data / "stray.png")
    assert len(content(copied(data, near))) == 83
