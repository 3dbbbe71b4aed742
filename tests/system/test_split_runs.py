"""Runs on a folder of classes without splits: the same split on any number of ranks, and for ever."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from distil_tl.cli.predict import main as predict
from tests.helpers.arguments import small_args
from tests.helpers.images import draw, make_folder
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import evaluated, refused, same_result, stopped_train, traced_train

SHORT = ["stages.full.epochs=1", "stages.head.features=off", "data.split.val=0.25"]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 3 classes, of which one is there twice."""
    root = make_folder(tmp_path_factory.mktemp("flat") / "shapes", {"": 57})
    for i in (0, 3, 6):
        shutil.copyfile(root / "circles" / f"{i:04d}.png", root / "circles" / f"again{i}.png")
    return root


@pytest.fixture(scope="module")
def alone(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert train([*small_args(flat), *SHORT, f"run_dir={run_dir}"]) == 0
    return run_dir


def split_of(run_dir: Path) -> dict[str, str]:
    with (run_dir / "split.csv").open(newline="") as file:
        return {row["path"]: row["split"] for row in csv.DictReader(file)}


def test_ranks_train_on_the_same_images_of_the_same_split(flat: Path, alone: Path, tmp_path: Path) -> None:
    steps = {}
    for world in (1, 2, 4):
        args = [*small_args(flat), *SHORT, "stages.full.epochs=0", f"run_dir={tmp_path}/{world}"]
        results = run_ranks(world, traced_train, args)
        assert [status for status, _ in results] == [0] * world
        batches = [seen for _, seen in results]
        steps[world] = [sorted(pair for of_rank in step for pair in of_rank) for step in zip(*batches, strict=True)]
        assert split_of(tmp_path / str(world)) == split_of(alone)
    assert steps[1] == steps[2] == steps[4]
    assert len(steps[1]) == 5
    found = split_of(alone)
    assert len(found) == 60
    assert sorted(found.values()).count("val") == 16
    assert all(found[f"circles/again{i}.png"] == found[f"circles/{i:04d}.png"] for i in (0, 3, 6))


def test_a_killed_run_resumes_with_its_split(flat: Path, alone: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(flat, moved)
    args = [*small_args(moved), *SHORT, f"run_dir={tmp_path}/run"]
    assert run_ranks(1, stopped_train, args, 7, 0, signal.SIGTERM) == [3]
    before = (tmp_path / "run" / "split.csv").read_bytes()
    assert train(args) == 0
    same_result(tmp_path / "run", alone)
    assert (tmp_path / "run" / "split.csv").read_bytes() == before == (alone / "split.csv").read_bytes()


def test_images_that_changed_are_named_and_do_not_move_others(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(flat, data)
    args = [*small_args(data), *SHORT, f"run_dir={tmp_path}/run"]
    assert run_ranks(1, stopped_train, args, 3, 0, signal.SIGTERM) == [3]
    draw("noise", np.random.default_rng(9)).save(data / "noise" / "new.png")
    assert "differ from those that this run was started with (1 added ('noise/new.png'))" in refused(args, capsys)
    assert "data.split.seed: was 0, now 1" in refused([*args, "data.split.seed=1"], capsys)


def test_evaluation_holds_to_the_split(
    flat: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    def counted(*args: str) -> int:
        assert evaluated([str(alone), "--json", str(out), *args]) == 0
        return int(json.loads(out.read_text())["n"])

    saved = json.loads((alone / "evaluation.json").read_text())
    assert counted() == saved["n"] == 16
    moved = tmp_path / "moved"
    shutil.copytree(flat, moved)
    assert counted("--split", "train", f"data.root={moved}") == 44
    assert evaluated([str(alone), "--split", "test"]) == 2
    assert "has no images in test" in capsys.readouterr().err
    (moved / "noise" / "0001.png").rename(moved / "noise" / "other.png")
    assert evaluated([str(alone), f"data.root={moved}"]) == 2
    assert "1 of the 60 images" in capsys.readouterr().err
    others = make_folder(tmp_path / "others", {"": 3})
    for path in others.rglob("*.png"):
        path.rename(path.with_name(f"other{path.name}"))
    assert counted(f"data.root={others}") == 3


def test_a_copy_on_the_local_disk_has_the_same_split(flat: Path, alone: Path, tmp_path: Path) -> None:
    args = [*small_args(flat), *SHORT, f"run_dir={tmp_path}/run", f"data.stage_to={tmp_path}/near"]
    assert train(args) == 0
    same_result(tmp_path / "run", alone)
    copied = next((tmp_path / "near").glob("shapes-*/ready/images"))
    assert sorted(path.name for path in copied.iterdir()) == ["train", "val"]


def test_a_table_of_the_same_images_gives_the_same_run(flat: Path, alone: Path, folder: Path, tmp_path: Path) -> None:
    rows = [f"{path.relative_to(flat)};{path.parent.name}" for path in sorted(flat.rglob("*.png"))]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["Datei;Klasse", *rows]), encoding="utf-8-sig")
    args = [*small_args(flat), *SHORT, f"run_dir={tmp_path}/run"]
    assert run_ranks(1, stopped_train, [*args, f"data.labels={table}"], 7, 0, signal.SIGTERM) == [3]
    moved = tmp_path / "moved.csv"
    moved.write_text("\n".join(["path,label", *(row.replace(";", ",") for row in reversed(rows))]))
    assert train([*args, f"data.labels={moved}"]) == 0
    same_result(tmp_path / "run", alone)
    assert (tmp_path / "run" / "split.csv").read_bytes() == (alone / "split.csv").read_bytes()
    out = tmp_path / "out.json"
    assert evaluated([str(tmp_path / "run"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["n"] == 16
    assert evaluated([str(tmp_path / "run"), "--json", str(out), f"data.root={folder}"]) == 0
    assert json.loads(out.read_text())["n"] == len(list((folder / "val").rglob("*.png")))


def test_a_kept_split_is_a_table(flat: Path, alone: Path, tmp_path: Path) -> None:
    args = [*small_args(flat), *SHORT, f"run_dir={tmp_path}/run", f"data.labels={alone}/split.csv"]
    args.remove("data.split.val=0.25")
    assert train(args) == 0
    same_result(tmp_path / "run", alone)


def test_predictions_know_the_split(
    flat: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(*args: str) -> int:
        assert predict([str(alone), *args, "-o", str(tmp_path / "out.csv"), "--workers=0"]) == 0
        return len((tmp_path / "out.csv").read_text().splitlines()) - 1

    assert rows(str(flat)) == 60
    assert "the model was trained on 44 of these 60 images; --split val leaves them out" in capsys.readouterr().err
    assert rows(str(flat), "--split=val") == 16
    assert predict([str(alone), str(flat / "noise"), "--split=test"]) == 2
    assert f"none of the images is in test of the run, which names them by their paths below {flat}" in (
        capsys.readouterr().err
    )
    moved = flat.rename(tmp_path / "moved")
    try:
        assert rows(str(moved), "--split=val") == 16
    finally:
        moved.rename(flat)


def test_weights_of_images(flat: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = split_of(alone)

    def run(name: str, world: int, weight: list[str], *more: str) -> Path:
        rows = [
            f"{path};{path.split('/')[0]};{own};{weight[i % len(weight)]}"
            for i, (path, own) in enumerate(found.items())
        ]
        (tmp_path / "labels.csv").write_text("\n".join(["path;label;split;weight", *rows]))
        args = [*small_args(flat), *SHORT, f"data.labels={tmp_path}/labels.csv", f"run_dir={tmp_path}/{name}", *more]
        args.remove("data.split.val=0.25")
        assert run_ranks(world, train, args) == [0] * world
        return tmp_path / name

    same_result(run("equal", 1, ["0,5"]), alone)
    one, two = (lines(run(f"{n}", n, ["1", "0", "4"]), window="epoch", split="train") for n in (1, 2))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)
    assert one[0]["loss"] != pytest.approx(lines(alone, window="epoch", split="train")[0]["loss"], rel=1e-3)
    search = [
        "stages.head.features=on",
        "data.augment=none",
        "stages.head.search.lr=[0.1,0.01]",
        "stages.full.epochs=0",
    ]
    run("search", 1, ["1", "0", "4"], *search)
    with (tmp_path / "1" / "split.csv").open(newline="") as file:
        assert {row["weight"] for row in csv.DictReader(file)} == {"0.0", "1.0", "4.0"}
