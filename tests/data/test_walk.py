"""The walk through folders of images: what it finds, what it leaves out and says, what it refuses."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from distil_tl.cli import predictions
from distil_tl.data.scan import scan
from distil_tl.data.walk import describe, walk
from distil_tl.utils.errors import UserError
from tests.helpers.image_folders import plant

ENDINGS = (".jpg", ".png")


def test_linked_folders_are_followed_and_the_rest_is_counted(tmp_path: Path) -> None:
    photos = plant(tmp_path / "photos", "b/2.jpg", "b/1.PNG", "a.jpg", "c.heic", "d.HEIC", "b/e.gif", "README")
    plant(tmp_path / "elsewhere", "x.jpg")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    ignored: Counter[str] = Counter()
    found = walk(photos, "", ENDINGS, ignored)
    assert [(folder, [image.name for image in images]) for folder, images in found] == [
        ("", ["a.jpg"]), ("b", ["1.PNG", "2.jpg"]), ("linked", ["x.jpg"]),
    ]  # fmt: skip
    assert describe(ignored) == "4 other files ignored: 2 .heic, 1 .gif, 1 without an extension"
    files = [file.relative_to(photos).as_posix() for file in predictions.find_images([photos], ENDINGS)]
    assert files == ["a.jpg", "b/1.PNG", "b/2.jpg", "linked/x.jpg"]
    assert describe(Counter()) == ""


def test_run_directories_are_not_searched(tmp_path: Path) -> None:
    photos = plant(tmp_path, "a.jpg", "f/config.yaml", "f/checkpoints/x.pt", "f/samples/b.jpg", "f/c.jpg", "f/d.txt")
    plant(photos, "g/checkpoints/e.jpg")  # a class of that name
    ignored: Counter[str] = Counter()
    found = walk(photos, "", ENDINGS, ignored)
    assert [f"{folder}/{image.name}" for folder, images in found for image in images] == [
        "/a.jpg", "g/checkpoints/e.jpg",
    ]  # fmt: skip
    assert describe(ignored) == "1 run directory not searched"
    ignored[".txt"] += 1
    assert describe(ignored) == "1 other file ignored: 1 .txt; 1 run directory not searched"
    with pytest.raises(UserError, match="f is a run directory; give the images' folder"):
        scan(photos / "f")


def test_what_other_programs_leave_behind_is_no_class_and_no_image(tmp_path: Path) -> None:
    plant(
        tmp_path, "cat/1.jpg", "dog/1.jpg", ".ipynb_checkpoints/1.jpg", "__MACOSX/cat/._1.jpg", "cat/._1.jpg",
        "cat/@eaDir/1.jpg/thumb.jpg", "dog/.ipynb_checkpoints/1-checkpoint.jpg",
    )  # fmt: skip
    index = scan(tmp_path)
    assert index.classes == ("cat", "dog")
    assert [index.relative_path(i) for i in range(len(index))] == ["cat/1.jpg", "dog/1.jpg"]
    assert index.ignored == 5
    assert index.ignored_note == "5 other files ignored: 2 .ipynb_checkpoints, 1 ._*, 1 @eaDir, 1 __MACOSX"
    assert type(index).from_arrays(index.to_arrays()).ignored_note == index.ignored_note


def test_a_pipe_named_like_an_image_and_a_loop_are_refused(tmp_path: Path) -> None:
    plant(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="contains itself: remove the symbolic link"):
        predictions.find_images([tmp_path])
    (tmp_path / "a" / "loop").unlink()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg' is named like an image but is not a regular file"):
        predictions.find_images([tmp_path])


def test_nothing_to_predict_says_what_there_is(tmp_path: Path) -> None:
    plant(tmp_path, "a/1.heic", "a/2.heic")
    with pytest.raises(UserError, match=r"no image in .* \(2 other files ignored: 2 \.heic\); image files end in"):
        predictions.find_images([tmp_path])
