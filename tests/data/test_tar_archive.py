"""Tar files of images: unpacked completely or not at all on each node, and never outside their folder."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from distil_tl import config as configuration
from distil_tl.config import load, run_name
from distil_tl.data.config import DataConfig
from distil_tl.data.splits import open_splits
from distil_tl.train import main
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import small_args
from tests.helpers.images import make_folder
from tests.helpers.ranks import lines, run_ranks
from tests.helpers.runs import refused, same_result
from tests.helpers.staging import ALONE, SHORT, fingerprints, folders_of, watched_train


@pytest.fixture(scope="module")
def unstaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unstaged") / "run"
    assert main([*small_args(folder), *SHORT, f"run_dir={run_dir}"]) == 0
    return run_dir


def pack(path: Path, root: Path, prefix: str = "") -> Path:
    # GNU format has one header per member; in the other format, the file could also be cut between two headers.
    mode, gnu = "w:gz" if path.name.endswith("gz") else "w", tarfile.GNU_FORMAT
    with tarfile.open(path, mode, format=gnu) as tar:  # type: ignore[call-overload]
        for split in ("val", "train"):
            tar.add(root / split, f"{prefix}{split}")
    return path


def left(near: Path) -> list[str]:
    return [path.name for path in near.rglob("*") if path.is_file() or path.is_symlink()]


def refusal(archive: Path, near: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_splits(ALONE, DataConfig(root=str(archive), stage_to=str(near)))
    return str(caught.value)


@pytest.mark.parametrize(("name", "prefix"), [("a.tar", ""), ("a.tar.gz", "./flowers/"), ("a.tgz", "./")])
def test_a_tar_file_gives_the_same_run_as_its_folder(
    folder: Path, near: Path, tmp_path: Path, unstaged: Path, capsys: pytest.CaptureFixture[str], name: str, prefix: str
) -> None:
    archive = pack(tmp_path / name, folder, prefix)
    args = [*small_args(archive), *SHORT, f"data.stage_to={near}"]
    assert main([*args, f"run_dir={tmp_path}/run"]) == 0
    assert "images: 83 files, " in capsys.readouterr().out
    same_result(tmp_path / "run", unstaged)
    assert fingerprints(tmp_path / "run") == fingerprints(unstaged)
    paths = [m["path"] for m in json.loads((tmp_path / "run" / "evaluation.json").read_text())["mistakes"]]
    assert paths
    assert all(path.startswith(f"{archive}/val/") for path in paths)
    (place,) = folders_of(near)
    assert place.name.startswith("a-")
    config = DataConfig(root=str(archive), stage_to=str(near))
    before = open_splits(ALONE, config).train
    assert "using the existing copy" in capsys.readouterr().out
    next(place.rglob("*.png")).unlink()
    after = open_splits(ALONE, config).train
    assert "images: 83 files, " in capsys.readouterr().out
    assert (before.fingerprint, before.times) == (after.fingerprint, after.times), "part of the key of features"


def test_two_nodes_unpack_and_a_run_is_resumed_only_with_the_same_images(
    folder: Path, tmp_path: Path, near: Path, unstaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack(tmp_path / "a.tar", folder)
    disks: list[str | None] = [str(tmp_path / "disk-0"), str(tmp_path / "disk-1")]
    args = [*small_args(archive), *SHORT, f"run_dir={tmp_path}/run", "data.stage_to=$DISK"]
    found = run_ranks(2, watched_train, args, disks)
    assert [status for status, _, _ in found] == [0, 0], found
    assert [roots[0].startswith(str(disk)) for (_, roots, _), disk in zip(found, disks, strict=True)] == [True, True]
    assert lines(tmp_path / "run")[-1]["top1"] == pytest.approx(lines(unstaged)[-1]["top1"])
    # If one node cannot unpack it, all stop with an error that names the node.
    found = run_ranks(2, watched_train, [*args, f"run_dir={tmp_path}/other"], [disks[0], None])
    assert [status for status, _, _ in found] == [2, 2]
    assert f"can't be unpacked to data.stage_to=$DISK on node 1 ({os.uname().nodename}): DISK is not set" in found[0][2]

    image = next((folder / "train" / "noise").iterdir())
    more = make_folder(tmp_path / "more", {"train": 52, "val": 31})
    (more / "train" / "noise" / image.name).unlink()
    changed = pack(tmp_path / "b.tar", more)
    (tmp_path / "run" / "summary.json").unlink()
    message = refused([*small_args(changed), *SHORT, f"run_dir={tmp_path}/run", f"data.stage_to={near}"], capsys)
    assert f"the images in {changed}/train differ from those that this run was started with" in message
    assert f"1 removed ('noise/{image.name}')" in message


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


OUTSIDE, NEITHER = "would be written outside the folder", "is neither a file nor a folder"
EVIL: dict[str, tuple[list[tarfile.TarInfo], str]] = {
    "absolute": ([member("/INSIDE/evil.png")], f"'/INSIDE/evil.png' {OUTSIDE}"),
    "above": ([member("train/../../evil.png")], f"'train/../../evil.png' {OUTSIDE}"),
    "folder above": ([member("../evil", tarfile.DIRTYPE)], f"'../evil' {OUTSIDE}"),
    "link": ([member("train/x.png", tarfile.SYMTYPE, "../../../../secret")], f"'train/x.png' {NEITHER}"),
    "through a link": ([member("way", tarfile.SYMTYPE, "../.."), member("way/evil.png")], f"'way' {NEITHER}"),
    "hard link": ([member("train/x.png", tarfile.LNKTYPE, "/etc/passwd")], f"'train/x.png' {NEITHER}"),
    "device": ([member("train/null", tarfile.CHRTYPE)], f"'train/null' {NEITHER}"),
    "pipe": ([member("train/pipe.png", tarfile.FIFOTYPE)], f"'train/pipe.png' {NEITHER}"),
    "twice": ([member("train/x.png"), member("train/x.png")], "File exists: "),
    "a file as a folder": ([member("train/x"), member("train/x/1.png")], "File exists: "),
    "nothing": ([member(".", tarfile.DIRTYPE), member("")], "directory"),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_that_writes_outside_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    members, reason = EVIL[name]
    archive, near = tmp_path / "evil.tar", tmp_path / "inside" / "near"
    near.mkdir(parents=True)
    (tmp_path / "inside" / "secret").write_text("secret")
    with tarfile.open(archive, "w") as tar:
        tar.add(folder / "train", "train")
        for each in members:
            each.name = each.name.replace("/INSIDE", f"{tmp_path}/inside")
            tar.addfile(each, io.BytesIO())
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(near)}
    said = refused([*small_args(archive), f"data.stage_to={near}", f"run_dir={tmp_path}/run"], capsys)
    assert f"data.root={archive} can't be unpacked to data.stage_to=" in said
    assert reason in said.replace(f"{tmp_path}/inside", "/INSIDE")
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(near)} == before
    assert left(near) == ["lock"]


def cut_in_a_member(data: bytes) -> bytes:
    return data[: len(data) // 2 + 100]


def cut_between_members(data: bytes) -> bytes:
    at = data.rindex(b"ustar", 0, len(data) // 2) - 257  # the start of a header
    assert at % 512 == 0
    return data[:at]


def overwritten(data: bytes) -> bytes:
    before = cut_between_members(data)
    return before + b"\xff" * 512 + data[len(before) + 512 :]


def with_a_hole(data: bytes) -> bytes:
    before = cut_between_members(data)
    return before + bytes(4096) + data[len(before) + 4096 :]


@pytest.mark.parametrize("damage", [cut_in_a_member, cut_between_members, overwritten, with_a_hole])
@pytest.mark.parametrize("packed", [False, True], ids=["tar", "gz"])
def test_a_damaged_archive_is_refused(
    folder: Path, tmp_path: Path, near: Path, damage: Callable[[bytes], bytes], packed: bool
) -> None:
    data = damage(pack(tmp_path / "a.tar", folder).read_bytes())
    archive = tmp_path / ("b.tar.gz" if packed else "b.tar")
    archive.write_bytes(gzip.compress(data) if packed else data)
    said = refusal(archive, near)
    assert "it is damaged or truncated" in said or "it changed or is truncated" in said
    assert left(near) == ["lock"]


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_gzip_is_refused(folder: Path, tmp_path: Path, near: Path, damage: str) -> None:
    archive = pack(tmp_path / "a.tar.gz", folder)
    whole = bytearray(archive.read_bytes())
    if damage == "cut":
        whole = whole[: len(whole) // 2]
    else:  # the checksum at the end
        whole[-8] ^= 1
    archive.write_bytes(whole)
    assert "it is damaged or truncated" in refusal(archive, near)
    assert left(near) == ["lock"]


def test_an_archive_that_does_not_fit(
    folder: Path, tmp_path: Path, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "a.tar", folder)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_frsize=4096, f_bavail=10))
    assert f"{archive.stat().st_size / 1e6:.1f} MB do not fit in {near}, where 0.0 MB are free" in refusal(
        archive, near
    )


def test_an_archive_of_something_else(folder: Path, tmp_path: Path, near: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "train" / "noise", "images/noise")
    assert "contains no train/CLASS/*.jpg and val/CLASS/*.jpg (its folders: images)" in refusal(
        tmp_path / "a.tar", near
    )
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(folder / "train", "train")
    said = refusal(tmp_path / "b.tar", near)
    assert "val does not exist" in said.replace("'", "")
    assert said.endswith(f"(unpacked from {tmp_path}/b.tar)")


def test_an_empty_class_in_a_tar_file_is_detected(folder: Path, tmp_path: Path, near: Path) -> None:
    archive = pack(tmp_path / "a.tar", folder)
    with tarfile.open(archive, "a") as tar:
        tar.addfile(member("train/forgotten", tarfile.DIRTYPE))
    assert "forgotten" in refusal(archive, near)


@pytest.mark.parametrize(
    ("name", "stage_to", "message"),
    [
        (
            "a.tar",
            None,
            "is a tar file, but training reads a folder: let each node unpack it, for example",
        ),
        ("a.tar.zst", "/tmp", "is neither a folder nor a tar file (.tar, .tar.gz, .tgz)"),
        ("broken.tar", "/tmp", "broken.tar is not a tar file, or is damaged"),
        ("missing.tar", "/tmp", "missing.tar is not a folder"),
    ],
)
def test_other_files_are_refused_before_the_start(
    folder: Path, tmp_path: Path, name: str, stage_to: str | None, message: str
) -> None:
    pack(tmp_path / "a.tar", folder)
    (tmp_path / "a.tar.zst").write_bytes(b"(\xb5/\xfd")
    (tmp_path / "broken.tar").write_bytes(b"<html>not found</html>")
    args = [*small_args(tmp_path / name), *([f"data.stage_to={stage_to}"] if stage_to else [])]
    with pytest.raises(UserError) as caught:
        configuration.check(load(args)[0], 1)
    assert message in str(caught.value)


def test_the_run_is_named_after_the_data_not_the_local_folder(folder: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "roses.tar.gz", folder)
    (name,) = {run_name(load([*small_args(archive), *more])[0]) for more in ([], ["data.stage_to=$TMPDIR"])}
    assert name.startswith("roses-test_resnet-")


def test_evaluation_requires_a_folder(folder: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", folder)
    with pytest.raises(UserError, match=r"a\.tar is not a folder; unpack it and give the folder"):
        configuration.check_evaluation(load([*small_args(archive), "data.stage_to=/tmp"])[0])
    with pytest.raises(
        UserError, match=r"nowhere is not a folder; if the images were moved, add data.root=NEW_FOLDER$"
    ):
        configuration.check_evaluation(load(small_args(tmp_path / "nowhere"))[0])
    table = [*small_args(folder), f"data.labels={tmp_path}/nowhere.csv"]
    with pytest.raises(UserError, match=r"is not a file; if .* add data.root=NEW_FOLDER, or data.labels=FILE$"):
        configuration.check_evaluation(load(table)[0])
