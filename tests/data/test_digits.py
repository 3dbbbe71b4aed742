from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distil_tl.data import digits as demo
from distil_tl.data.digits import digits_folder
from distil_tl.data.scan import scan
from distil_tl.utils.errors import UserError

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    digits_folder(cache)
    return cache


@pytest.fixture
def own_cache(cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(cache, tmp_path / "cache")
    return tmp_path / "cache"


def test_an_image_folder_split_four_to_one_in_each_class(cache: Path):
    folder = digits_folder(cache)
    assert folder == cache / "digits-v1"
    train = scan(folder / "train")
    val = scan(folder / "val", train.classes)
    assert train.classes == tuple("0123456789")
    assert (len(train), len(val)) == (1442, 355)
    assert val.missing == ()
    assert val.class_counts.tolist() == (np.bincount(datasets.load_digits().target) // 5).tolist()
    assert train.ignored == val.ignored == 0
    assert [path.name for path in cache.iterdir()] == ["digits-v1"]


def test_the_pixels_and_classes_are_scikit_learns(cache: Path):
    digits = datasets.load_digits()
    folder = digits_folder(cache)
    paths = sorted(folder.glob("*/*/*.png"), key=lambda path: path.stem)
    assert [path.stem for path in paths] == [f"{i:04d}" for i in range(1797)]
    for path, image, label in zip(paths, digits.images, digits.target, strict=True):
        with Image.open(path) as opened:
            assert opened.mode == "L"
            assert np.abs(np.asarray(opened) - image * 255 / 16).max() <= 0.5
        assert path.parent.name == str(label)


def test_the_files_are_the_same_everywhere(cache: Path):
    # Every run on the demo data refers to this.
    assert scan(cache / "digits-v1" / "train").fingerprint.startswith("6da45807c3fd")
    assert scan(cache / "digits-v1" / "val").fingerprint.startswith("72de4d0610e7")


def test_readable_by_others(cache: Path, tmp_path: Path):
    (tmp_path / "plain").mkdir()
    assert digits_folder(cache).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_default_is_the_cache_directory(own_cache: Path, monkeypatch):
    monkeypatch.setenv("DISTIL_TL_CACHE", str(own_cache))
    assert digits_folder() == own_cache / "digits-v1"


def test_a_later_call_writes_nothing(own_cache: Path, monkeypatch):
    monkeypatch.setattr(demo, "_write", lambda _: pytest.fail("written again"))
    assert digits_folder(own_cache) == own_cache / "digits-v1"


@pytest.mark.parametrize("damage", ["file", "class", "manifest", "cut manifest", "all", "emptied"])
def test_damage_is_repaired(own_cache: Path, damage):
    folder = own_cache / "digits-v1"
    if damage == "file":
        next((folder / "train" / "3").iterdir()).unlink()
    elif damage == "class":
        shutil.rmtree(folder / "val" / "7")
    elif damage == "manifest":
        (folder / "manifest.json").unlink()
    elif damage == "cut manifest":
        (folder / "manifest.json").write_text('{"train/0')
    else:
        shutil.rmtree(folder)
        if damage == "emptied":
            folder.mkdir()
    digits_folder(own_cache)
    assert len(scan(folder / "train")) == 1442
    assert len(scan(folder / "val")) == 355
    assert sum(json.loads((folder / "manifest.json").read_text()).values()) == 1797
    assert [path.name for path in own_cache.iterdir()] == ["digits-v1"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch):
    save = Image.Image.save
    calls = 0

    def interrupted(self, *args, **options):
        nonlocal calls
        calls += 1
        if calls > 1000:
            raise KeyboardInterrupt
        save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_process_may_finish_first(cache: Path, tmp_path: Path, monkeypatch):
    write = demo._write

    def overtaken(built: Path) -> None:
        write(built)
        shutil.copytree(cache / "digits-v1", tmp_path / "digits-v1")
        (tmp_path / "digits-v1" / "theirs").touch()

    monkeypatch.setattr(demo, "_write", overtaken)
    assert (digits_folder(tmp_path) / "theirs").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["digits-v1"]


def test_several_processes_at_once(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from distil_tl.data.digits import digits_folder, _is_complete;"
        "assert _is_complete(digits_folder(Path(sys.argv[1])))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["digits-v1"]


def test_without_scikit_learn(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'distil_tl\[demo\]'"):
        digits_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"tmp.*file.*DISTIL_TL_CACHE"):
        digits_folder(tmp_path / "file" / "cache")
