"""Scans of splits: the same images as torchvision's ImageFolder; refusals name the file or folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder, folder

from distil_tl.data.config import IMG_EXTENSIONS, DataConfig
from distil_tl.data.find_splits import balance_hint
from distil_tl.data.index import Index
from distil_tl.data.scan import scan
from distil_tl.utils.errors import UserError
from tests.helpers.image_folders import assert_as_torchvision, assert_equal, plant


def test_extensions_are_torchvisions():
    assert IMG_EXTENSIONS == folder.IMG_EXTENSIONS


def test_nested_folders_in_torchvisions_order(tmp_path: Path):
    plant(
        tmp_path,
        # "-" sorts before "/", "0" after it; the class's own files come first; upper case before lower
        *("b/z.jpg", "b/a/1.png", "b/a-b/1.png", "b/a0/1.png", "b/a/deep/er/x.TIFF", "b/B.jpg", "b/a.jpg"),
        *("a/2.JPG", "a/10.jpeg", "a/notes.txt", "a/.jpg", "a/Thumbs.db", "a/sub.jpg/in.bmp", "A/1.webp"),
        *("a b/1.pgm", "a/none/readme.md", "stray.jpg"),
    )
    index = assert_as_torchvision(tmp_path)
    assert index.classes == ("A", "a", "a b", "b")
    assert index.ignored == 4  # notes.txt, Thumbs.db, readme.md and the image outside any class
    assert index.class_counts.tolist() == [1, 4, 1, 7]
    assert index.missing == ()


_name = st.text(st.sampled_from("ab.-_ 0Z\n\u00e9\u732b\U0001f600\udcff"), min_size=1, max_size=5).filter(
    lambda name: name not in (".", "..") and not name.startswith("._")  # which other programs leave behind
)
_file = st.tuples(st.lists(_name, min_size=1, max_size=3), _name, st.sampled_from([".jpg", ".PNG", "", ".txt"]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(_file, min_size=1, max_size=12))
def test_any_tree_gives_the_same_samples_as_torchvision(tmp_path: Path, files):
    shutil.rmtree(tmp_path)
    for folders, name, extension in files:
        parent = tmp_path.joinpath(*folders)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            (parent / (name + extension)).write_bytes(b"xy")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
    try:
        index = assert_as_torchvision(tmp_path)
    except UserError:
        with pytest.raises(FileNotFoundError):
            ImageFolder(tmp_path)
    else:
        assert_equal(Index.from_arrays(index.to_arrays()), index)


def test_links_to_folders_and_files_are_followed(tmp_path: Path):
    store = plant(tmp_path / "store", "pictures/1.jpg", "pictures/more/2.jpg", "single")
    split = plant(tmp_path / "split", "a/0.jpg")
    (split / "b").symlink_to(store / "pictures")
    (split / "a" / "again").symlink_to(store / "pictures")
    (split / "a" / "and-again").symlink_to(store / "pictures")  # twice is not a loop
    (split / "a" / "9.jpg").symlink_to(store / "single")
    index = assert_as_torchvision(split)
    assert len(index) == 8
    assert index.sizes[index.class_to_idx["a"]] == len("a/0.jpg")


@pytest.mark.parametrize(("target", "found"), [("a", "loop"), (".", "loop"), ("a/deep", "loop"), ("..", "loop/split")])
def test_a_loop_of_links_is_refused_by_name(tmp_path: Path, target, found):
    split = plant(tmp_path / "split", "a/deep/1.jpg")
    (split / "a" / "deep" / "loop").symlink_to((split / target).resolve())
    with pytest.raises(UserError, match=rf"split/a/deep/{found}' contains itself"):
        scan(split)


def test_a_link_to_itself_is_refused_by_name(tmp_path: Path):
    plant(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "me.jpg").symlink_to("me.jpg")
    with pytest.raises(UserError, match=r"me\.jpg.* is broken"):
        scan(tmp_path)


@pytest.mark.parametrize("link", ["a/lost.jpg", "a/lost_folder", "lost_class"])
def test_a_broken_link_that_loses_images_is_refused_by_name(tmp_path: Path, link):
    plant(tmp_path, "a/1.jpg")
    (tmp_path / link).symlink_to("/nowhere/at/all")
    with pytest.raises(UserError, match=f"{link}.* is broken.*/nowhere/at/all"):
        scan(tmp_path)


def test_a_broken_link_that_is_no_image_is_only_counted(tmp_path: Path):
    plant(tmp_path, "a/1.jpg")
    (tmp_path / "a" / ".#notes.txt").symlink_to("ada@host.1234")
    assert assert_as_torchvision(tmp_path).ignored == 1


def test_a_whole_link_that_is_no_image_is_only_counted(tmp_path: Path):
    plant(tmp_path, "a/1.jpg", "a/notes.txt")
    (tmp_path / "a" / "README").symlink_to("notes.txt")
    assert assert_as_torchvision(tmp_path).ignored == 2


def test_a_pipe_named_as_an_image_is_refused(tmp_path: Path):
    plant(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "a" / "2.jpg")
    with pytest.raises(UserError, match=r"2\.jpg.* not a regular file"):
        scan(tmp_path)


def test_a_closed_folder_is_refused(tmp_path: Path, monkeypatch):
    plant(tmp_path, "a/1.jpg", "a/closed/2.jpg")
    scandir = os.scandir

    def guarded(path):  # chmod has no effect for root
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=r"no permission to read the folder .*a/closed"):
        scan(tmp_path)


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing.* does not exist"):
        scan(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a folder"):
        scan(plant(tmp_path, "file") / "file")


def test_images_directly_in_the_split(tmp_path: Path):
    with pytest.raises(UserError, match=r"one sub-folder per class.*it has 2 images but no sub-folder"):
        scan(plant(tmp_path, "1.jpg", "2.PNG", "notes.txt"))


def test_an_empty_split(tmp_path: Path):
    with pytest.raises(UserError, match=r"one sub-folder per class.*it has no sub-folder"):
        scan(tmp_path)
    plant(tmp_path, "a/notes.txt", "b/x.gif")
    for classes in (None, ["a", "b", "c"]):
        with pytest.raises(UserError, match=r"no images in any of the 2 class folders.*\.webp"):
            scan(tmp_path, classes)


def test_class_folders_without_images_are_named(tmp_path: Path):
    plant(tmp_path, "a/1.jpg", "b/notes.txt", ".cache/x.ipynb")
    with pytest.raises(UserError, match=r"'\.cache' \(a hidden folder, probably left by a tool\), 'b';"):
        scan(tmp_path)


def test_long_lists_of_names_are_shortened(tmp_path: Path):
    plant(tmp_path, "a/1.jpg", *(f"empty{i:02d}/x.txt" for i in range(20)))
    with pytest.raises(UserError, match=r"'empty07' and 12 more;"):
        scan(tmp_path)


def test_more_extensions(tmp_path: Path):
    plant(tmp_path, "a/1.HEIC", "a/2.jpg", "b/3.avif", "b/4.heif")
    config = DataConfig(extensions=["heic", "avif"])
    index = scan(tmp_path, extensions=config.image_extensions)
    assert [index.relative_path(i) for i in range(len(index))] == ["a/1.HEIC", "a/2.jpg", "b/3.avif"]
    assert index.ignored == 1
    assert config.problems() == []
    (problem,) = DataConfig(extensions=["heic", ".jxl", "tga"]).problems()
    assert problem == "data.extensions has '.jxl', 'tga'; it may have some of avif, gif, heic, heif, jp2"
    with pytest.raises(UserError, match=r"class folders without images.*'b'.*\.webp, \.jp2"):
        scan(tmp_path, extensions=DataConfig(extensions=["jp2"]).image_extensions)
    (tmp_path / "b" / "lost.heic").symlink_to("nowhere")
    with pytest.raises(UserError, match="broken"):
        scan(tmp_path, extensions=config.image_extensions)


def test_one_class_is_allowed(tmp_path: Path):
    assert scan(plant(tmp_path, "only/1.jpg")).classes == ("only",)


def test_given_classes_decide_the_targets(tmp_path: Path):
    plant(tmp_path, "ant/1.jpg", "cat/1.jpg", "dog/notes.txt")
    index = scan(tmp_path, classes=["dog", "cat", "bee", "ant"])
    assert index.classes == ("dog", "cat", "bee", "ant")
    assert [(index.relative_path(i), int(index.targets[i])) for i in range(2)] == [
        ("ant/1.jpg", 3),
        ("cat/1.jpg", 1),
    ]
    assert index.class_counts.tolist() == [0, 1, 0, 1]
    assert index.missing == ("dog", "bee")
    with pytest.raises(ValueError, match="differ"):
        scan(tmp_path, classes=["dog", "cat", "ant", "dog"])


def test_a_class_that_training_lacks_is_refused(tmp_path: Path):
    plant(tmp_path, "cat/1.jpg", "dogs/1.jpg", ".cache/1.jpg", "yak/1.jpg")
    with pytest.raises(UserError) as caught:
        scan(tmp_path, classes=["cat", "dog"])
    assert "'.cache' (a hidden folder, probably left by a tool), 'dogs', did you mean `dog`?, 'yak'" in str(
        caught.value
    )


def test_messages_can_be_printed(tmp_path: Path):
    (tmp_path / os.fsdecode(b"a\n\xff")).mkdir()
    with pytest.raises(UserError) as caught:
        scan(plant(tmp_path, "b/1.jpg"))
    str(caught.value).encode("utf-8")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [1, 16])
def test_threads_change_nothing(tmp_path: Path, threads):
    plant(tmp_path, *(f"{c}/{i}.jpg" for c in range(30) for i in range(c % 4 + 1)))
    assert_equal(scan(tmp_path, threads=threads), scan(tmp_path))


@pytest.mark.parametrize(
    ("numbers", "balance", "said"), [((40, 4), "none", True), ((39, 4), "none", False), ((40, 4), "weights", False)]
)
def test_classes_of_very_different_size_are_pointed_out(
    tmp_path: Path, numbers: tuple[int, int], balance: str, said: bool
) -> None:
    for name, number in zip("ab", numbers, strict=True):
        (tmp_path / name).mkdir()
        for i in range(number):
            (tmp_path / name / f"{i}.png").touch()
    hint = balance_hint(scan(tmp_path), balance)
    assert (hint is not None) is said
    if hint is not None:
        assert "class a has 10 times as many images as b (40 and 4): try data.balance=logit_adjust" in hint
