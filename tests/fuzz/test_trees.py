"""Any folder of images, used or refused in a sentence: nothing of it is changed, and every file is accounted for."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from distil_tl.cli import predict, prepare
from distil_tl.config import Config
from distil_tl.data.scan import scan
from distil_tl.inference import RestoredModel
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build as build_model
from distil_tl.utils.errors import UserError
from tests.fuzz.running import End, bounded, explore, fault_of, run_main, snapshot
from tests.fuzz.trees import Node, build, count_files, trees
from tests.helpers.arguments import SMALLEST

LONG = pytest.mark.fuzz


@contextlib.contextmanager
def fresh(root: Path) -> Iterator[Path]:
    """An empty folder, which is removed at the end."""
    root.mkdir()
    try:
        yield root
    finally:
        shutil.rmtree(os.fsencode(root))


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=LONG)])
def test_a_scan(examples: int, tmp_path: Path) -> None:
    def body(tree: list[Node]) -> tuple[End, str, object]:
        with fresh(tmp_path / "x") as place:
            build(place / "data", tree)
            before, fault, status = snapshot(place), "", 0
            try:
                with bounded():
                    index = scan(place / "data" / "train")
                used, there = len(index) + index.ignored, count_files(place / "data" / "train")
                if used != there:
                    fault = f"{len(index)} images and {index.ignored} ignored of {there} files: {index.ignored_note}"
                elif re.match(r"([\d,]*)", index.ignored_note)[1] != (f"{index.ignored:,}" if index.ignored else ""):  # type: ignore[index]
                    fault = index.ignored_note
            except UserError:
                status = 2
            fault = fault or ("changed" if snapshot(place) != before else "")
            return End(status, "", ""), fault, tree

    explore(trees(), examples, body)


@pytest.fixture(scope="module")
def restored() -> RestoredModel:
    config = Config()
    model = build_model(ModelConfig(SMALLEST, "none"), 2, image_size=32, seed=0)
    return RestoredModel(config, model, ["cat", "dog"], 32, Path("checkpoint"), "fp32")


@pytest.mark.parametrize("examples", [10, pytest.param(1000, marks=LONG)])
def test_a_prediction(examples: int, tmp_path: Path, restored: RestoredModel) -> None:
    def body(tree: list[Node]) -> tuple[End, str, object]:
        with fresh(tmp_path / "x") as place:
            build(place / "data", tree, ("",))
            before, out = snapshot(place), tmp_path / "out.csv"
            with mock.patch("distil_tl.cli.predictions.restore_model", return_value=restored):
                end = run_main(
                    predict.main, ["run", str(place / "data"), "-o", str(out), "--workers=0", "--device=cpu"]
                )
            fault = fault_of(end) or ("changed" if snapshot(place) != before else "")
            if out.exists():
                rows = list(csv.reader(out.open(encoding="utf-8", newline="")))[1:]
                out.unlink()
                ignored = re.search(r"([\d,]+) other files? ignored", end.err)
                used = len(rows) + (int(ignored[1].replace(",", "")) if ignored else 0)
                there = count_files(place / "data")
                if not fault and end.status == 0 and used != there:
                    fault = f"{len(rows)} rows and {ignored and ignored[0]} of {there} files"
                if not fault and any(bool(row[1]) == bool(row[3]) for row in rows):
                    fault = f"a row with neither or both: {rows}"
            elif end.status == 0:
                fault = fault or "no output"
            return end, fault, tree

    explore(trees(), examples, body)


@pytest.mark.parametrize("examples", [10, pytest.param(1000, marks=LONG)])
def test_a_copy(examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)

    def body(tree: list[Node]) -> tuple[End, str, object]:
        with fresh(tmp_path / "x") as place:
            build(place / "data", tree)
            before, out = snapshot(place), tmp_path / "x" / "out"
            args = [str(place / "data"), "--out", str(out), "--resize=8", "--workers=0"]
            end = run_main(prepare.main, args)
            fault = fault_of(end)
            now = snapshot(place)
            changed = {path for path in before if before[path] != now.get(path)} - {os.fsencode(place)}
            fault = fault or (f"changed: {changed}" if changed else "")
            if not fault and end.status == 0:
                manifest = json.loads((out / "prepared.json").read_text())
                for split in ("train", "val"):
                    left_out = re.search(rf"{split}: .*?([\d,]+) other files? ignored", end.out)
                    used = manifest["images"][split] + (int(left_out[1].replace(",", "")) if left_out else 0)
                    if used != (there := count_files(place / "data" / split)):
                        fault = (
                            f"{split}: {manifest['images'][split]} images, {left_out and left_out[0]}, of {there} files"
                        )
                    if len(scan(out / split)) != manifest["images"][split]:
                        fault = f"the copy of {split} has other images"
            return end, fault, tree

    explore(trees(), examples, body)
