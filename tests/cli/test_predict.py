"""`distil-tl predict`: which images it takes, what it writes, what it refuses. tests/system runs it on a real run."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distil_tl.cli import predictions
from distil_tl.cli.predict import main
from distil_tl.cli.prediction_rows import RowFormat, write_rows
from distil_tl.utils.errors import UserError
from distil_tl.utils.outputs import open_output


def test_folders_are_searched_in_order_and_named_files_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/x.webp", "a/notes.txt", "z.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    files = predictions.find_images([tmp_path / "z.dat", tmp_path])
    assert [str(file.relative_to(tmp_path)) for file in files] == ["z.dat", "a/x.webp", "b/1.JPG", "b/2.png"]
    with pytest.raises(UserError, match="no image in"):
        predictions.find_images([tmp_path / "empty"])
    with pytest.raises(UserError, match="no file or folder"):
        predictions.find_images([tmp_path / "nowhere"])


def test_images_given_twice_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    assert predictions.given_twice(predictions.find_images([tmp_path])) == ""
    monkeypatch.chdir(tmp_path)
    files = predictions.find_images([tmp_path, Path("a.png"), Path("a.png")])
    said = predictions.given_twice(files)
    assert said == f"1 image is given more than once, with a row each time ({tmp_path}/a.png)"


@pytest.mark.parametrize("all_classes", [False, True])
def test_a_file_that_cannot_be_read_has_a_row_with_its_error(all_classes: bool) -> None:
    file, results = io.StringIO(), list[Tensor | str]([torch.tensor([0.25, 0.75]), "not an image"])
    files, classes = [Path("a.png"), Path("b.png")], ["rose", "tulip"]
    unreadable = write_rows(file, files, results, classes, RowFormat(all_classes=all_classes))
    assert unreadable == 1
    expected = [
        "path,prediction,probability,p(rose),p(tulip),error",
        "a.png,tulip,0.750000,0.250000,0.750000,",
        "b.png,,,,,not an image",
    ]
    if not all_classes:
        expected = ["path,prediction,probability,error", "a.png,tulip,0.750000,", "b.png,,,not an image"]
    assert file.getvalue().splitlines() == expected


def test_the_most_probable_classes_as_columns_or_json() -> None:
    results: list[Tensor | str] = [torch.tensor([0.2, 0.5, 0.3]), "not an image"]
    files, classes = [Path("a.png"), Path("b.png")], ["rose", "t\u00fclip", "aster"]
    file = io.StringIO()
    write_rows(file, files, results, classes, RowFormat(top=2))
    assert file.getvalue().splitlines() == [
        "path,prediction,probability,prediction_2,probability_2,error",
        "a.png,t\u00fclip,0.500000,aster,0.300000,",
        "b.png,,,,,not an image",
    ]
    file = io.StringIO()
    assert write_rows(file, files, results, classes, RowFormat("jsonl", top=5, all_classes=True)) == 1
    first, second = (json.loads(line) for line in file.getvalue().splitlines())
    assert first == {
        "path": "a.png",
        "prediction": "t\u00fclip",
        "probability": 0.5,
        "top": [{"class": c, "probability": p} for c, p in (("t\u00fclip", 0.5), ("aster", 0.3), ("rose", 0.2))],
        "probabilities": {"rose": 0.2, "t\u00fclip": 0.5, "aster": 0.3},
    }
    assert second == {"path": "b.png", "error": "not an image"}


def test_a_csv_for_excel_has_a_mark_semicolons_and_decimal_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, results = io.StringIO(), list[Tensor | str]([torch.tensor([0.25, 0.75]), "not an image; or a new kind"])
    write_rows(file, [Path("a,1.png"), Path("b.png")], results, ["rose", "t\u00fclip"], RowFormat(excel=True))
    assert file.getvalue() == (
        '\ufeffpath;prediction;probability;error\na,1.png;t\u00fclip;0,750000;\nb.png;;;"not an image; or a new kind"\n'
    )
    monkeypatch.setattr(predictions, "predict", lambda *args, **settings: 0)
    out = tmp_path / "out.csv"
    out.write_text(file.getvalue(), encoding="utf-8")
    assert main(["model.onnx", "x.png", "--excel", "-o", str(out)]) == 0  # it is an earlier output
    assert main(["model.onnx", "x.png", "--excel", "--format", "jsonl"]) == 2
    assert "--excel is for CSV" in capsys.readouterr().err


def test_arguments_that_are_swapped_or_above_or_below_a_run_directory_get_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/checkpoints/step-00000001", "runs/b/checkpoints", "photos"):
        Path(name).mkdir(parents=True)
    for name in ("a", "b"):
        Path("runs", name, "config.yaml").write_text("data:\n  root: flowers\n")
    for arguments, message in (
        (["photos", "runs/a"], "photos is not a run directory; give runs/a first, and the images after it"),
        (["runs", "photos"], "runs is not a run directory; it holds runs/a, runs/b: give one of them"),
        (["runs/a/checkpoints/step-00000001", "photos"], "give runs/a --checkpoint step-00000001"),
        (["runs/a/checkpoints", "photos"], "runs/a/checkpoints is not a run directory, but in one: give runs/a\n"),
        (["runs/a", "runs/b"], "runs/b is a run directory (of images in flowers); give the images' folder"),
        (["photos", "photos"], "photos is not a run directory: config.yaml is missing"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_failure_leaves_no_part_of_a_csv(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("earlier")
    with suppress(ZeroDivisionError), open_output(out) as file:
        file.write("part")
        raise ZeroDivisionError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--strict"], 1)])
@pytest.mark.parametrize("unreadable", [0, 2])
def test_a_file_that_cannot_be_read_is_an_error_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, options: list[str], status: int, unreadable: int
) -> None:
    monkeypatch.setattr(predictions, "predict", lambda *args, **settings: unreadable)
    assert main(["model.onnx", "x.png", *options]) == (status if unreadable else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size and --top must be at least 1"),
        (["--workers", "-1"], "--workers at least 0"),
        (["--workers", "257"], "--workers at most 256"),
        (["--batch-size", "99999999999999999999"], "--batch-size must be at most 65,536"),
        (["-o", "nowhere/out.csv"], "there is no folder nowhere"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["RUN_DIR", "x.png", *options]) == 2
    assert message in capsys.readouterr().err
