"""A split that is made for images that have none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distil_tl.data import splits as splits_module
from distil_tl.data.config import SPLIT_FILE, DataConfig, SplitConfig
from distil_tl.data.find_splits import find_splits
from distil_tl.data.index import Array, Index
from distil_tl.data.scan import scan
from distil_tl.data.split import TEST, TRAIN, VAL, assign_splits, identical_files
from distil_tl.data.split_file import splits_of, write_split_file
from distil_tl.data.splits import Splits
from distil_tl.utils.errors import UserError


def folder_of(root: Path, **classes: int) -> Path:
    """Files with different contents, of the same sizes."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}.jpg").write_bytes(f"{name}{i:07d}".encode().ljust(20))
    return root


def codes_of(root: Path, **config: object) -> Array:
    return assign_splits(scan(root), SplitConfig(**config), None, compare_contents=True).codes  # type: ignore[arg-type]


def by_class(index: Index, codes: Array, split: int) -> list[int]:
    return [int((codes[index.targets == target] == split).sum()) for target in range(len(index.classes))]


def test_each_class_is_divided_and_small_ones_stay_in_train(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "a", daisy=50, rose=11, tulip=3, weed=2)
    index = scan(root)
    made = assign_splits(index, SplitConfig(val=0.2, test=0.1), None, compare_contents=True)
    assert by_class(index, made.codes, VAL) == [10, 2, 1, 0]
    assert by_class(index, made.codes, TEST) == [5, 1, 0, 0]
    assert made.notes == [
        "20% val and 10% test of each class, seed 0",
        "classes of too few images for val: 'weed'",
        "classes of too few images for test: 'tulip', 'weed'",
    ]


def test_it_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "a", daisy=40, rose=40)
    codes = codes_of(root)
    other = tmp_path / "elsewhere"
    for path in sorted(root.rglob("*.jpg"), reverse=True):  # written in another order, at another time
        target = other / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    assert codes_of(other).tolist() == codes.tolist()
    assert codes_of(root, seed=1).tolist() != codes.tolist()
    # Recorded: a run that is started again must divide its images as before, with any version.
    assert np.flatnonzero(codes == VAL).tolist() == RECORDED


RECORDED = [2, 5, 7, 8, 13, 22, 24, 37, 47, 64, 67, 70, 71, 72, 77, 78]


def test_identical_files_stay_together_in_any_class(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "a", daisy=40, rose=40)
    originals = [root / "daisy" / f"{i:03d}.jpg" for i in range(40)]
    for i, path in enumerate(originals[:20]):
        shutil.copyfile(path, root / ("daisy", "rose")[i % 2] / f"copy{i:02d}.jpg")
    index = scan(root)
    made = assign_splits(index, SplitConfig(val=0.3), None, compare_contents=True)
    split_of = {index.relative_path(i): int(code) for i, code in enumerate(made.codes)}
    pairs = [
        (split_of[f"daisy/{i:03d}.jpg"], split_of[f"{('daisy', 'rose')[i % 2]}/copy{i:02d}.jpg"]) for i in range(20)
    ]
    assert all(a == b for a, b in pairs)
    assert {a for a, _ in pairs} == {TRAIN, VAL}, "they are not all kept out of a split"
    assert by_class(index, made.codes, VAL) == [15, 15]
    assert "40 byte-identical files stay together" in made.notes
    without = assign_splits(index, SplitConfig(val=0.3), None, compare_contents=False)
    assert any("distil-tl prepare" in note for note in without.notes)


def test_files_of_another_size_are_not_read(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "a", daisy=1)
    (root / "daisy" / "long.jpg").write_bytes(b"x" * 100)
    (root / "daisy" / "empty.jpg").touch()
    (root / "daisy" / "empty2.jpg").touch()
    index = scan(root)
    shutil.rmtree(root)
    assert identical_files([index]).size == 0


def test_groups_stay_in_one_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("daisy", "rose"):
        (tmp_path / name).mkdir()
        for garden in range(30):
            for i in range(int(rng.integers(1, 9))):
                (tmp_path / name / f"garden{garden}_{i}.jpg").write_bytes(f"{name} {garden} {i}".encode())
    index = scan(tmp_path)
    made = assign_splits(index, SplitConfig(val=0.2, test=0.2, group=r"garden(\d+)_"), None, compare_contents=True)
    gardens = [index.relative_path(i).split("garden")[1].split("_")[0] for i in range(len(index))]
    splits: dict[str, set[int]] = {}
    for i, code in enumerate(made.codes.tolist()):
        splits.setdefault(gardens[i], set()).add(code)
    assert all(len(found) == 1 for found in splits.values()), "a garden has daisies and roses"
    for split, share in ((TRAIN, 0.6), (VAL, 0.2), (TEST, 0.2)):
        assert np.array(by_class(index, made.codes, split)) == pytest.approx(share * index.class_counts, abs=6)
    assert codes_of(tmp_path, val=0.2, test=0.2, group=r"garden(\d+)_", seed=1).tolist() != made.codes.tolist()


def test_a_class_of_one_group_stays_in_train(tmp_path: Path) -> None:
    folder_of(tmp_path, daisy=20, rose=20)
    for i in range(20):
        (tmp_path / "rose" / f"{i:03d}.jpg").rename(tmp_path / "rose" / f"a_{i:03d}.jpg")
    made = assign_splits(scan(tmp_path), SplitConfig(group=r"daisy/\d+|a_"), None, compare_contents=True)
    assert by_class(scan(tmp_path), made.codes, TRAIN)[1] == 20
    with pytest.raises(UserError, match="too few groups, of which a class needs at least two"):
        codes_of(tmp_path, group="rose|daisy")


def test_a_wrong_pattern_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, daisy=20)
    for wrong in ("(", "a{99999999999}"):
        with pytest.raises(UserError, match="is not a regular expression"):
            codes_of(tmp_path, group=wrong)
    with pytest.raises(UserError, match="not found in the paths of 10 of 20 images: 'daisy/010.jpg'"):
        codes_of(tmp_path, group="/00")


def test_too_few_images_for_any_val_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, daisy=2, rose=1)
    with pytest.raises(UserError, match=r"data.split.val=0.2: the largest class has 2 images"):
        codes_of(tmp_path)


def splits_with(root: Path, seed: int) -> Splits:
    found, _ = find_splits(DataConfig(root=str(root), split=SplitConfig(seed=seed)), root)
    return Splits(found["train"], found["val"], found.get("test"))


def test_a_kept_split_is_up_to_date_after_any_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a checkpoint may be started again with another seed, and killed while it keeps its split."""
    root, run_dir = folder_of(tmp_path / "images", daisy=20, rose=20), tmp_path / "run"
    run_dir.mkdir()
    splits_with(root, 1).save(run_dir)
    expected = (run_dir / SPLIT_FILE).read_text()
    writes = ["write_split_file", "write_atomic", "write_atomic"]
    for done in range(len(writes) + 1):
        splits_with(root, 0).save(run_dir)
        assert (run_dir / SPLIT_FILE).read_text() != expected
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            left = iter([True] * done)
            for name in set(writes):
                patch.setattr(splits_module, name, killed_after(left, getattr(splits_module, name)))
            splits_with(root, 1).save(run_dir)
        splits_with(root, 1).save(run_dir)
        assert (run_dir / SPLIT_FILE).read_text() == expected, f"killed after {done} files"


def killed_after(left: Iterator[bool], write: Callable[..., None]) -> Callable[..., None]:
    def written(*args: Any) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        write(*args)

    return written


def test_files_are_found_in_a_kept_split_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path / "images", daisy=5)
    (root / "daisy" / "copy.jpg").symlink_to("000.jpg")
    found, _ = find_splits(DataConfig(root=str(root)), root)
    write_split_file(tmp_path / "split.csv", found)
    (tmp_path / "link").symlink_to("images")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for top in (root, tmp_path / "link"):
        for start in (root, tmp_path / "link", Path("../images"), Path("../link")):
            names = ["daisy/000.jpg", "daisy/004.jpg", "daisy/copy.jpg", "daisy/other.jpg"]
            listed = splits_of(tmp_path / "split.csv", top, [start / name for name in names])
            assert [own is None for own in listed] == [False, False, False, True], (top, start)
