"""A feature cache written by earlier code is found again by the same run, under the same key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distil_tl.train import main
from tests.helpers.ranks import lines
from tests.helpers.recorded_features import ABOUT, RECORDED, copy_of_images, keys_are_comparable


def test_the_same_run_uses_the_recorded_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*ABOUT["arguments"], f"data.root={copy_of_images(tmp_path / 'images')}", f"run_dir={tmp_path}/run"]
    args.append("stages.head.augment=null")  # the default when it was recorded
    if not keys_are_comparable(args):
        pytest.skip("recorded with another version of torch, or on another kind of CPU")
    shutil.copytree(RECORDED / "cache", tmp_path / "cache")
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    files = {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*")}
    assert main(args) == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*")} == files
    assert [line["loss"] for line in lines(tmp_path / "run")] == pytest.approx(ABOUT["losses"], rel=1e-5)
