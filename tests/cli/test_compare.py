"""`distil-tl compare`: two models on the same images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from distil_tl.cli.compare import main
from distil_tl.cli.comparison import Pairs, count_pairs
from distil_tl.evaluate import main as evaluate
from distil_tl.utils.intervals import plus_minus
from tests.helpers.trained import make_run


def test_the_figures_are_those_of_the_literature() -> None:
    # Agresti and Min (2005): ratings of a prime minister, 1,600 people asked twice.
    pairs = Pairs(both=794, only_first=150, only_second=86, none=570)
    assert pairs.accuracies == (944 / 1600, 880 / 1600)
    assert pairs.interval == pytest.approx((-0.0587, -0.0213), abs=2e-4)
    assert pairs.p_value == pytest.approx(3.7e-5, rel=0.05)
    assert Pairs(148, 4, 9, 21).p_value == pytest.approx(2 * 1093 / 2**13)
    assert Pairs(0, 4900, 5100, 0).p_value == pytest.approx(0.0466, abs=2e-4)  # at once; normal: z = 1.99
    assert Pairs(10, 0, 0, 3).p_value == pytest.approx(1)
    assert Pairs(10, 2, 2, 3).p_value == 1


def test_pairs_are_counted() -> None:
    targets, first, second = np.array([0, 1, 2, 0, 1]), np.array([0, 1, 2, 1, 0]), np.array([0, 2, 2, 0, 2])
    assert count_pairs(targets, first, second) == Pairs(both=2, only_first=1, only_second=1, none=1)


def test_two_runs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, data, seed) for name, seed in (("a", 1), ("b", 8))]
    (data / "val" / "noise" / "damaged.png").write_bytes(b"\x89PNG")
    assert main([str(run) for run in runs] + ["--json", str(tmp_path / "out.json"), "--images", "2"]) == 0
    printed = capsys.readouterr()
    content = json.loads((tmp_path / "out.json").read_text())
    assert "1 of 32 images can't be read; left out" in printed.err
    assert content["n"] == 31
    for run, top1 in zip(runs, content["top1"], strict=True):
        evaluate([str(run), "--json", str(run / "val.json"), "data.on_bad_image=skip"])
        assert json.loads((run / "val.json").read_text())["top1"] == top1
    all_of_val = json.loads((runs[1] / "val.json").read_text())
    assert content["top1_intervals"][1] == all_of_val["intervals"]["top1"]
    shown = plus_minus(content["top1"][1], content["top1_intervals"][1])
    assert [re.split(r"\s{2,}", line)[-2] for line in printed.out.splitlines() if line.startswith("all ")] == [shown]
    flipped = content["flipped"]
    assert len(flipped) == content["only_first"] + content["only_second"] > 2
    assert all((row["first"] == row["class"]) != (row["second"] == row["class"]) for row in flipped)
    assert sum(row["n"] for row in content["per_class"]) == 31
    assert f"2 of {len(flipped)} images that only one gets right" in printed.out
    assert flipped[1]["path"] in printed.out
    assert flipped[2]["path"] not in printed.out
    assert "--split test" in printed.out
    assert main([*map(str, runs), "--split", "train"]) == 0
    assert "--split test" not in capsys.readouterr().out


def test_the_split_that_was_made_for_a_run_is_compared(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, data / "train", seed) for name, seed in (("a", 1), ("b", 8))]
    images = sorted((data / "train").glob("*/*.png"))
    for run, every in zip(runs, (4, 5), strict=True):
        with (run / "split.csv").open("w") as file:
            file.write("path,label,split,bytes\n")
            for i, path in enumerate(images):
                split = "train" if i % every else "val"
                file.write(f"{path.relative_to(data / 'train')},{path.parent.name},{split},{path.stat().st_size}\n")
    assert main([str(run) for run in runs]) == 0
    printed = capsys.readouterr()
    assert f"val, {-(-len(images) // 4)} images" in printed.out
    assert f"{runs[1]} was trained on" in printed.err
    assert f"{runs[0]} was trained on" not in printed.err
    assert main([*map(str, runs), "--data", str(data)]) == 0
    assert "val, 31 images" in capsys.readouterr().out


def test_other_classes_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "a", data, 1), make_run(tmp_path / "b", data, 1, ["circles", "noise", "lines"])]
    assert main([str(run) for run in runs]) == 2
    assert "have other classes (lines, stripes): only models of the same classes" in capsys.readouterr().err
    data.rename(tmp_path / "moved")
    assert main([str(runs[0]), str(runs[0])]) == 2
    assert f"data.root={data} of {runs[0]} is not a folder; if the images were moved" in capsys.readouterr().err
    assert main([str(runs[0]), str(runs[0]), f"--data={tmp_path}/moved"]) == 0
    assert main([str(runs[0]), str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main([str(runs[0]), str(runs[0]), "--images", "-1"]) == 2
    assert "--images must be at least 0" in capsys.readouterr().err
