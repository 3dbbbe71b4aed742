"""What doctor says of images that have no split, and of tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_tl.data.config import DataConfig
from distil_tl.data.find_splits import find_splits
from distil_tl.data.split_file import write_split_file
from distil_tl.doctor.images import ImagesFound, look_at_images
from distil_tl.doctor.lines import FAIL, Report
from tests.helpers.images import make_folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("flat") / "shapes", {"": 45})


def examined(config: DataConfig, run_dir: Path) -> tuple[Report, ImagesFound]:
    report, found = Report(), ImagesFound()
    look_at_images(report, config, None, found, run_dir)
    return report, found


def test_a_folder_without_a_split_is_divided_as_a_run_does(flat: Path, tmp_path: Path) -> None:
    config = DataConfig(root=str(flat))
    report, found = examined(config, tmp_path)
    assert not [line for line in report.lines if line.status == FAIL]
    assert any("has no split, so one is made: 20% val of each class" in line.text for line in report.lines)
    assert found.images == {"train": 36, "val": 9}
    assert found.classes == 3
    other = DataConfig(root=str(flat))
    other.split.seed = 1
    write_split_file(tmp_path / "split.csv", find_splits(other, flat)[0])
    report, held = examined(config, tmp_path)
    assert held.indexes["val"].fingerprint == find_splits(other, flat)[0]["val"].fingerprint
    assert any("as in " in line.text for line in report.lines)


def test_a_table_with_wrong_rows_fails(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\nnoise/0001.png,noise\nnoise/lost.png,noise\n")
    report, found = examined(DataConfig(root=str(flat), labels=str(tmp_path / "labels.csv")), tmp_path)
    failed = [line.text for line in report.lines if line.status == FAIL]
    assert len(failed) == 1
    assert "line 3: there is no file" in failed[0]
    assert found.indexes == {}


def test_classes_of_very_different_size_are_pointed_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "shapes", {"": 45})
    for image in sorted((root / "noise").iterdir())[3:]:
        image.unlink()
    config = DataConfig(root=str(root))
    config.split.val = 0.4
    config.global_batch_size = 4
    hints = [line.text for line in examined(config, tmp_path)[0].lines if "times as many" in line.text]
    assert not hints
    for number in range(2):
        make_folder(tmp_path / f"more{number}", {"": 45})
    for number, path in enumerate(sorted(tmp_path.glob("more*/circles/*"))):
        path.rename(root / "circles" / f"more{number}.png")
    hints = [line.text for line in examined(config, tmp_path)[0].lines if "times as many" in line.text]
    assert len(hints) == 1
    assert "data.balance=logit_adjust" in hints[0]
