"""A permanent split of a folder of classes or a table, and images that are in two splits."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distil_tl.cli.prepare import main
from distil_tl.data import duplicates
from distil_tl.data.config import DataConfig, SplitConfig
from distil_tl.data.find_splits import find_splits
from distil_tl.data.index import Array
from tests.helpers.images import make_folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of 3 classes, of which one is there twice."""
    root = make_folder(tmp_path_factory.mktemp("flat") / "shapes", {"": 30})
    shutil.copyfile(root / "circles" / "0000.png", root / "circles" / "again.png")
    return root


def prepare(*args: object) -> None:
    assert main([*map(str, args), "--workers=0"]) == 0


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(list(map(str, args))) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def below(root: Path) -> dict[str, set[str]]:
    return {
        split: {str(path.relative_to(root / split)) for path in (root / split).rglob("*.png")}
        for split in ("train", "val", "test")
    }


def test_a_copy_has_the_split_of_a_run(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(flat, "--out", tmp_path / "copy", "--test=0.2", "--seed=3")
    config = DataConfig(root=str(flat), split=SplitConfig(test=0.2, seed=3))
    made, _ = find_splits(config, flat)
    assert below(tmp_path / "copy") == {
        split: {index.relative_path(i) for i in range(len(index))} for split, index in made.items()
    }
    said = capsys.readouterr().out
    message = refused(capsys, flat, "--out", tmp_path / "copy", "--test=0.3", "--seed=3")
    assert "was made with --test=0.2; delete it" in message
    assert "20% val and 20% test of each class, seed 3; 2 byte-identical files stay together" in said
    assert (tmp_path / "copy/train/noise").is_dir()
    one = next((tmp_path / "copy").rglob("0001.png"))
    assert one.read_bytes() == (flat / "noise" / "0001.png").read_bytes()
    (tmp_path / "copy" / "train" / "noise" / one.name).unlink(missing_ok=True)
    prepare(flat, "--out", tmp_path / "copy", "--test=0.2", "--seed=3")
    assert one.exists()
    assert "was made with --test=0.2 --seed=3; delete it" in refused(capsys, flat, "--out", tmp_path / "copy")


def test_only_a_table_of_the_split(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(flat, "--out", tmp_path / "split.csv", "--no-duplicates")
    table = DataConfig(root=str(flat), labels=str(tmp_path / "split.csv"))
    same, _ = find_splits(table, flat)
    made, _ = find_splits(DataConfig(root=str(flat)), flat)
    assert {split: index.fingerprint for split, index in same.items()} == {
        split: index.fingerprint for split, index in made.items()
    }
    assert "exists: name a new file" in refused(capsys, flat, "--out", tmp_path / "split.csv")
    (tmp_path / "other.duplicates.csv").write_text("of the user")
    assert "exists, where duplicates are listed" in refused(capsys, flat, "--out", tmp_path / "other.csv")
    message = refused(capsys, flat, "--out", tmp_path / "other.csv", "--resize=64", "--val=2", "--group=(")
    assert "--val must be a share" in message
    assert "--resize needs a folder" in message


def test_images_of_a_table_go_into_folders_of_their_classes(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(flat, tmp_path / "photos")
    rows = [
        f"{p.relative_to(tmp_path / 'photos')},kind {len(p.parent.name)}" for p in (tmp_path / "photos").rglob("*.png")
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    prepare(tmp_path / "photos", "--labels", tmp_path / "labels.csv", "--out", tmp_path / "copy", "--resize=16")
    found = below(tmp_path / "copy")
    assert sum(map(len, found.values())) == 31
    assert {name.split("/")[0] for name in found["val"]} == {"kind 5", "kind 7"}
    assert all((tmp_path / "photos" / name.split("/", 1)[1]).exists() for name in found["train"])
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *(row.replace("kind ", "a/") for row in rows)]))
    assert "can't be names of folders" in refused(
        capsys, tmp_path / "photos", "--labels", tmp_path / "labels.csv", "--out", tmp_path / "other"
    )


def test_duplicates_across_splits_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imagehash")
    root = make_folder(tmp_path / "data", {"train": 9, "val": 6, "test": 3})
    shutil.copyfile(root / "train/circles/0003.png", root / "val/circles/same.png")
    with Image.open(root / "train/stripes/0002.png") as image:
        image.resize((90, 80)).save(root / "test/stripes/alike.jpg", quality=80)
    (root / "val/circles/broken.png").write_bytes(b"no image")
    prepare(root, "--out", tmp_path / "copy")
    with (tmp_path / "copy" / "duplicates.csv").open(newline="") as file:
        rows = {(r["kind"], r["split"], r["path"], r["other_split"], r["other_path"]) for r in csv.DictReader(file)}
    assert ("identical", "val", "circles/same.png", "train", "circles/0003.png") in rows
    assert ("similar", "test", "stripes/alike.jpg", "train", "stripes/0002.png") in rows
    assert "images that another split has as well: 1 identical files, and " in capsys.readouterr().out


def test_the_most_similar_hash_is_found() -> None:
    rng = np.random.default_rng(0)
    other = rng.integers(0, 1 << 63, 400, dtype=np.uint64)
    own = other[rng.integers(0, 400, 300)] ^ sum(
        np.uint64(1) << rng.integers(0, 64, 300, dtype=np.uint64) for _ in range(5)
    )

    def numbered(hashes: Array) -> Array:
        return np.stack([hashes, np.arange(len(hashes), dtype=np.uint64)[::-1]], axis=1)

    distances = np.array([[bin(int(a) ^ int(b)).count("1") for b in other] for a in own])
    found = duplicates.nearest(numbered(own), numbered(other))
    expected = distances.min(axis=1)
    assert found[:, 2].tolist() == expected[expected <= duplicates.NEAR].tolist()
    assert 0 < len(found) < 300
    for i, j, bits in found.tolist():
        assert distances[299 - i, 399 - j] == bits
