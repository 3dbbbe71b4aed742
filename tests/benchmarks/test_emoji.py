"""The tasks of benchmarks.recipes.emoji, from archives with a few images."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.recipes import emoji


def listed() -> list[dict[str, Any]]:
    """20 fruits, 3 birds, and one profession with 12 emoji."""
    fruits = [{"subcategory": "food-fruit", "category": "Food", "image": f"f{i}.png"} for i in range(20)]
    birds = [{"subcategory": "animal-bird", "category": "Animals", "image": f"b{i}.png"} for i in range(3)]
    person = {"subcategory": "person-role", "category": "People & Body"}
    cooks = [
        {**person, "short_name": f"{who}-cook", "image": f"{who}.png",
         "skin_variations": {str(i): {"image": f"{who}{i}.png"} for i in range(5)}} for who in ("male", "female")
    ]  # fmt: skip
    return [*fruits, *birds, *cooks]


def write_archive(folder: Path, vendor: str) -> None:
    names = [f"f{i}.png" for i in range(20)] + [f"{who}{i}.png" for who in ("male", "female") for i in ("", *range(5))]
    transparent = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(transparent, "png")
    files = {"package/emoji.json": json.dumps(listed()).encode()}
    files |= {f"package/img/{vendor}/64/{name}": transparent.getvalue() for name in names}
    with tarfile.open(folder / f"emoji-datasource-{vendor}-16.0.0.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_val_and_test_have_other_emoji_of_other_vendors(tmp_path: Path) -> None:
    for vendor in emoji.VENDORS:
        write_archive(tmp_path, vendor)
    assert emoji.main([str(tmp_path), str(tmp_path / "out")]) == 0
    found = {
        split: {tuple(path.name.split("-")) for path in (tmp_path / "out/categories" / split / "food-fruit").iterdir()}
        for split in ("train", "val", "test")
    }
    assert {split: len(names) for split, names in found.items()} == {"train": 24, "val": 8, "test": 8}
    assert {vendor for vendor, _ in found["train"]} == {"apple", "google"}
    assert {vendor for vendor, _ in found["val"] | found["test"]} == {"twitter", "facebook"}
    shown = [{name for _, name in names} for names in found.values()]
    assert sum(map(len, shown)) == len(set.union(*shown))
    assert not (tmp_path / "out/categories/train/animal-bird").exists(), "too few"
    assert len(list((tmp_path / "out/people/train/cook").iterdir())) == emoji.SHOWN
    with Image.open(next((tmp_path / "out/people/test/cook").iterdir())) as image:
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


def test_an_archive_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoji.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has 0 files emoji-datasource-apple-*.tgz: get one with `npm pack`" in capsys.readouterr().err
