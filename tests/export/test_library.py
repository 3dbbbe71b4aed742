"""`distil-tl export --format safetensors`: timm and torchvision load the files as they are."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

import distil_tl
from distil_tl.cli.export import main
from distil_tl.export.library import crop_share
from distil_tl.models.preprocess import Preprocess
from tests.export.conftest import SIZE
from tests.helpers.arguments import SMALLEST
from tests.helpers.images import CLASSES


def test_timm_loads_it(make_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, out, written = make_run(SMALLEST), tmp_path / "out", list[Path]()
    make = tempfile.mkdtemp

    def noted(suffix: str | None = None, prefix: str | None = None, dir: Path | None = None) -> str:
        if prefix == ".":
            written.append(Path(str(dir)))
        return make(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    for _ in range(2):  # an earlier export is replaced
        assert main([str(run_dir), "-o", str(out), "--format", "safetensors"]) == 0
    assert written == [tmp_path, out], "where the user has a folder, nothing is written beside it"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    own, transform, _ = distil_tl.load(run_dir)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        assert torch.allclose(loaded(images), own(images), atol=1e-5)
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)
    steps = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded)).transforms
    assert (steps[0].size, tuple(steps[1].size)) == (transform._view[0].size[0], (SIZE, SIZE))
    assert torch.equal(steps[-1].mean.flatten() * 255, transform._normalize.mean.flatten())


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_files_have_the_crop_that_their_library_knows(
    make_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    crop = [f"data.crop_mode={mode}", "data.crop_pct=0.9"]
    assert main([str(make_run(SMALLEST)), *crop, "-o", str(tmp_path / "a"), "--format", "safetensors"]) == 0
    assert "no transform for data.crop_mode=border" not in capsys.readouterr().out
    given = json.loads((tmp_path / "a" / "config.json").read_text())["pretrained_cfg"]
    assert (given["crop_mode"], math.floor(SIZE / given["crop_pct"])) == (mode, 35)

    assert main([str(make_run("shufflenet_v2_x0_5")), *crop, "-o", str(tmp_path / "b"), "--format", "safetensors"]) == 0
    assert ("no transform for data.crop_mode=border" in capsys.readouterr().out) == (mode == "border")
    given = json.loads((tmp_path / "b" / "config.json").read_text())["preprocess"]
    assert given["resize_size"] == ([35, 35] if mode == "squash" else 35)
    assert given.get("fill") == ([124, 116, 104] if mode == "border" else None)


def test_torchvision_loads_it(make_run: Callable[[str], Path], tmp_path: Path) -> None:
    run_dir = make_run("shufflenet_v2_x0_5")
    assert main([str(run_dir), "-o", str(tmp_path / "out"), "--format", "safetensors"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = torchvision.models.get_model(config["architecture"], **config["model_args"]).eval()
    loaded.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        assert torch.allclose(loaded(images), distil_tl.load(run_dir).model(images), atol=1e-5)
    assert (config["label_names"], config["preprocess"]["crop_size"]) == (list(CLASSES), SIZE)


@pytest.mark.parametrize(
    ("name", "readout", "size", "arguments"),
    [
        (SMALLEST, "avg_max", SIZE, {"global_pool": "catavgmax"}),
        ("timm/test_vit", "mean", 160, {"global_pool": "avg", "fc_norm": False}),
        ("timm/test_vit", "token", 160, {}),  # what timm pools
        ("timm/vit_tiny_patch16_dinov3_qkvb", "token", SIZE, {"global_pool": "token"}),
    ],
)
def test_timm_builds_a_read_out(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, readout: str, size: int, arguments: dict[str, object],
) -> None:  # fmt: skip
    run_dir, out = make_run(name, readout, size), tmp_path / "out"
    assert main([str(run_dir), "-o", str(out), "--format", "safetensors"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert {key: config["model_args"].get(key) for key in arguments} == arguments
    images = torch.rand(2, 3, size, size)
    given = {**config["model_args"], "num_classes": len(CLASSES), "checkpoint_path": out / "model.safetensors"}
    with torch.inference_mode():
        expected = distil_tl.load(run_dir).model(images)
        assert expected.abs().max() > 1e-3
        for loaded in (
            timm.create_model(f"local-dir:{out}", pretrained=True),
            timm.create_model(name.removeprefix("timm/"), **given),
        ):
            assert torch.allclose(loaded.eval()(images), expected, atol=1e-5)
    call = config["distil_tl"].get("load", "")
    assert all(f"{key}={value!r}" in call for key, value in arguments.items())
    assert bool(call) == bool(arguments) == ("without config.json: timm.create_model" in capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "readout", "library"),
    [(SMALLEST, "last2", "timm"), ("timm/test_convnext", "avg_max", "timm"),
     ("shufflenet_v2_x0_5", "avg_max", "torchvision")],
)  # fmt: skip
def test_a_read_out_that_no_library_builds_is_refused(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, readout: str, library: str,
) -> None:  # fmt: skip
    assert main([str(make_run(name, readout)), "-o", str(tmp_path / "out"), "--format", "safetensors"]) == 2
    message = f"no argument of {library} builds {name} with model.readout={readout}; use --format onnx"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_not_replaced(
    make_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "config.yaml"):  # as of a run directory
        (tmp_path / name).write_text("{}")
    for path, message in (
        (tmp_path, "has a config.json that `distil-tl export` did not write"),
        (tmp_path / "config.json", "is a file: name a folder"),
        (tmp_path / "no" / "folder", "there is no folder"),
    ):
        assert main([str(tmp_path), "-o", str(path), "--format", "safetensors"]) == 2
        assert message in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}", "{}"]
    (tmp_path / "config.json").write_text("5")
    assert main([str(tmp_path), "-o", str(tmp_path), "--format", "safetensors"]) == 2
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert main([str(tmp_path), "-o", str(tmp_path), "--format", "safetensors"]) == 2


def test_timm_resizes_to_the_same_size() -> None:
    for size in (9, 14, 23, 64, 96, 224):
        for resized in range(size, 2 * size):
            preprocess = Preprocess(crop_size=size, resize_size=resized)
            assert math.floor(size / crop_share(preprocess, size)) == resized
