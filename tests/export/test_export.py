"""`distil-tl export`: the file answers as PyTorch does, says what it expects, and is not left if it is wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import distil_tl
from distil_tl.cli import exports
from distil_tl.cli.export import main
from distil_tl.cli.predict import main as predict
from distil_tl.export import predict as script
from distil_tl.export.onnx_model import OnnxModel
from distil_tl.export.to_onnx import to_onnx
from distil_tl.utils.errors import UserError
from tests.export.conftest import SIZE
from tests.helpers.arguments import SMALLEST
from tests.helpers.images import CLASSES

TEMPERATURE = 2.5

# Runs the script with no other packages than the three that it needs.
ALONE = (
    "import runpy, sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'timm', 'distil_tl', 'onnx']));"
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def export(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def run_dir(make_run: Callable[[str], Path]) -> Path:
    """A run with a temperature for its best checkpoint."""
    run = make_run(SMALLEST)
    (run / "checkpoints" / "best" / "calibration.json").write_text(f'{{"temperature": {TEMPERATURE}}}')
    return run


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    assert export(run_dir, "-o", path) == 0
    return path


def test_it_answers_as_pytorch_for_any_number_of_images(exported: Path, run_dir: Path, folder: Path) -> None:
    model, transform, classes = distil_tl.load(run_dir)
    found = OnnxModel(exported)
    files = sorted((folder / "val").rglob("*.png"))
    for count in (1, 2, 5, 31):
        views = torch.stack([transform.view(file) for file in files[:count]])
        with torch.inference_mode():
            expected = (model(torch.stack([transform(file) for file in files[:count]])) / TEMPERATURE).softmax(1)
        assert found(views.numpy()) == pytest.approx(expected.numpy(), abs=1e-5)
    assert (found.classes, found.image_size) == (classes, SIZE)


def test_the_file_says_what_it_expects_and_where_it_comes_from(exported: Path, run_dir: Path) -> None:
    import onnx

    proto = onnx.load(exported)
    given, answer = proto.graph.input[0], proto.graph.output[0]
    shapes = [[d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in (given, answer)]
    assert [given.name, answer.name] == ["images", "probabilities"]
    assert shapes == [["batch", 3, SIZE, SIZE], ["batch", len(CLASSES)]]
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata["distil_tl.classes"] == list(CLASSES)
    assert metadata["distil_tl.preprocess"]["image_size"] == SIZE
    origin = metadata["distil_tl.provenance"]
    assert (origin["model"], origin["run"], origin["checkpoint"]) == (SMALLEST, run_dir.name, "step-00000001")
    assert origin["val"] == {"top1": 0.5}
    assert origin["temperature"] == TEMPERATURE
    content = exported.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(distil_tl.__file__).parent).encode() not in content


def test_the_script_alone_writes_the_same_csv_as_predict(exported: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("P", (40, 40)).save(tmp_path / "images" / "palette.png")
    Image.new("L", (40, 40), 90).save(tmp_path / "images" / "grey.jpg")
    Image.new("L", (40, 40), 90).save(tmp_path / "images" / "grün\r0.png")
    paths = [str(folder / "val"), str(tmp_path / "images")]
    outputs = [tmp_path / "script.csv", tmp_path / "package.csv"]
    command = [sys.executable, "-c", ALONE, str(exported.parent / "predict.py"), *paths, "--all", "-o", str(outputs[0])]
    ascii_locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ascii_locale)
    assert predict([str(exported), *paths, "--all", "-o", str(outputs[1])]) == 0
    rows = [list(csv.reader(output.open(encoding="utf-8", newline=""))) for output in outputs]
    (refused,) = [row for row in rows[0] if row[0].endswith("palette.png")]
    assert refused[-1].startswith("a PNG with mode P")
    assert "1 of 34 files can't be used" in done.stderr
    assert [row for row in rows[0] if row[0] != refused[0]] == [row for row in rows[1] if row[0] != refused[0]]
    assert len(rows[1]) == 35
    assert str(tmp_path / "images" / "grün\r0.png") in [row[0] for row in rows[0]]


def test_the_script_replaces_its_own_output_alone_and_writes_for_excel_as_predict_does(
    exported: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, package = tmp_path / "script.csv", tmp_path / "package.csv"
    images = sorted((folder / "val").rglob("*.png"))[:2]
    arguments = ["predict.py", *map(str, images), "--model", str(exported), "-o", str(out)]
    for more in ([], ["--excel", "--all"], ["--excel", "--all"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        assert script.main() == 0
        assert f"predict.py: 2 rows in {out}" in capsys.readouterr().err
    assert predict([str(exported), *map(str, images), "--excel", "--all", "-o", str(package)]) == 0
    assert out.read_bytes() == package.read_bytes()
    assert out.read_bytes().startswith(b"\xef\xbb\xbfpath;prediction;probability;p(")
    out.write_text("mine")
    assert script.main() == 2
    assert "exists, and is no earlier output: name another file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package.csv", "script.csv"]


def test_another_model_is_noticed_and_not_left(
    exported: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(exports, "to_onnx", lambda *_: exported.read_bytes())
    assert export(run_dir, "-o", path, "--checkpoint", "last") == 1
    said = capsys.readouterr().err
    assert "the ONNX model answers otherwise than PyTorch: a probability differs by" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(exported.read_bytes())
    assert export(run_dir, "-o", path, "--checkpoint", "last") == 1
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [exported.read_bytes()]
    path.write_text("mine")
    assert export(run_dir, "-o", path, "--checkpoint", "last") == 2
    assert "is no earlier output of this command" in capsys.readouterr().err


def test_it_can_be_had_without_the_temperature(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def noted(model: Any, size: int, metadata: dict[str, str], temperature: float | None) -> bytes:
        given.append((temperature, json.loads(metadata["distil_tl.provenance"]).get("temperature")))
        raise UserError("enough")

    monkeypatch.setattr(exports, "to_onnx", noted)
    for more in ([], ["--uncalibrated"]):
        assert export(run_dir, "-o", tmp_path / "model.onnx", *more) == 2
    assert given == [(TEMPERATURE, TEMPERATURE), (None, None)]
    assert export(run_dir, "-o", tmp_path / "model", "--format", "safetensors", "--uncalibrated") == 2
    assert "the models of --format safetensors give logits" in capsys.readouterr().err


def test_a_script_that_prepares_other_bytes_is_not_left(
    exported: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exports, "to_onnx", lambda *_: exported.read_bytes())
    prepared = script.prepare
    monkeypatch.setattr(script, "prepare", lambda path, settings: prepared(path, settings) // 2)
    assert export(run_dir, "-o", tmp_path / "model.onnx") == 1
    assert "predict.py prepares 31 of 31 images to other bytes than the package" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_torch_cannot_export_is_a_fault_without_a_traceback(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise NotImplementedError("no such operator\nand many more lines")

    monkeypatch.setattr(torch.onnx, "export", fails)
    assert export(run_dir, "-o", tmp_path / "model.onnx") == 1
    said = capsys.readouterr().err
    assert f"torch can't export {SMALLEST} to ONNX (no such operator); use --format safetensors" in said
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_into_one_file_are_refused() -> None:
    huge = SimpleNamespace(name="huge", module=torch.nn.Linear(30_000, 30_000, device="meta"))
    with pytest.raises(UserError, match=r"huge has 3,600,120,000 bytes of weights.*use --format safetensors"):
        to_onnx(huge, SIZE, {})  # type: ignore[arg-type]


def test_a_file_that_is_in_the_way_is_not_replaced(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predict.py").write_text("print()")
    assert export(run_dir, "-o", tmp_path / "model.onnx") == 2
    assert "predict.py is in the way" in capsys.readouterr().err
    assert export(run_dir, "-o", tmp_path / "model") == 2
    assert "name a file that ends in .onnx" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["predict.py"]
    (tmp_path / "predict.py").unlink()
    (tmp_path / "theirs.onnx").write_bytes(b"\x08\x08 of another program")
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "device.onnx").symlink_to("/dev/null")
    for name, message in {
        "theirs": "exists, and is another program's model",
        "pipe": "is not a regular file",
        "device": "is not a regular file",
    }.items():
        assert export(run_dir, "-o", tmp_path / f"{name}.onnx") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "predict.py").symlink_to(tmp_path / "pipe.onnx")
    assert export(run_dir, "-o", tmp_path / "model.onnx") == 2
    assert "is not a regular file" in capsys.readouterr().err


def test_refusals_of_predict(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    proto = onnx.load(exported)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    (tmp_path / "damaged.onnx").write_bytes(exported.read_bytes()[:5000])
    os.mkfifo(tmp_path / "pipe.onnx")
    for args, message in (
        ([tmp_path / "foreign.onnx"], "was not written by `distil-tl export`"),
        ([tmp_path / "damaged.onnx"], "onnxruntime can't read"),
        ([tmp_path / "none.onnx"], "there is no file"),
        ([tmp_path / "pipe.onnx"], "pipe.onnx is not a regular file"),
        ([exported, "--checkpoint", "last"], "--checkpoint is for a run directory"),
        ([exported, "--uncalibrated"], "--uncalibrated is for a run directory; for an ONNX file, give it to"),
        ([exported, "-o", exported], "is one of the inputs"),
    ):
        assert predict([*map(str, args), str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named(
    name: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert export(run_dir, "-o", tmp_path / "model.onnx") == 2
    said = capsys.readouterr().err
    assert f"{name} is needed" in said
    assert "pip install 'distil_tl[export]'" in said


def test_the_layout_is_channels_first_and_unscaled(exported: Path) -> None:
    found = OnnxModel(exported)
    with pytest.raises(Exception, match=r"(?i)dimension"):
        found(np.zeros((1, SIZE, SIZE, 3), dtype=np.uint8))
    with pytest.raises(Exception, match=r"(?i)type"):
        found(np.zeros((1, 3, SIZE, SIZE), dtype=np.float32))
