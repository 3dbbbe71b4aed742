"""The picture of what a stage trains on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from distil_tl import run as run_module
from distil_tl.train import main
from distil_tl.training.samples import COUNT, SIDE
from tests.helpers.arguments import small_args
from tests.helpers.runs import losses


def test_each_stage_has_one_and_training_does_not_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with" / "samples").mkdir(parents=True)
    (tmp_path / "with" / "samples" / "head.jpg").write_text("of another configuration, before the first checkpoint")
    assert main([*small_args(folder), f"run_dir={tmp_path}/with"]) == 0
    monkeypatch.setattr(run_module, "write_samples", lambda *_, **__: None)
    assert main([*small_args(folder), f"run_dir={tmp_path}/without"]) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "with" / "samples").iterdir())
    assert names == ["full.jpg", "head.jpg"]
    with Image.open(tmp_path / "with" / "samples" / "head.jpg") as picture:
        assert picture.size == (COUNT * (SIDE + 4) - 4, SIDE)
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 100
    page = (tmp_path / "with" / "report.html").read_text()
    assert "Training images of stage full" in page
